"""Run tasks without a server: submit a job to the service and run it in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from app.api.service import JobService
from app.config import AppConfig
from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.tasks import run_task
from app.tasks.context import JobContext, JobInterrupted, Services

FINAL_STATES = {JobSignal.STOP: JobState.STOPPED, JobSignal.PAUSE: JobState.PAUSED,
                JobSignal.CANCEL: JobState.CANCELLED}  # fmt: skip


@dataclass
class ObservedContext(JobContext):
    """A context that calls `on_report` before each progress report."""

    on_report: Callable[[JobContext, dict[str, Any]], None] = lambda context, changes: None

    def report_progress(self, **changes: Any) -> None:
        self.on_report(self, changes)
        super().report_progress(**changes)


class TaskHarness:
    """Services in `folder`/data, with the assets below `roots`."""

    def __init__(self, folder: Path, *roots: Path) -> None:
        self.config = AppConfig(data_dir=folder / "data", folders=tuple(roots), workspace=folder / "made")
        self.services = Services.from_config(self.config)
        self.service = JobService(self.services)

    def asset(self, kind: Any, path: Path) -> str:
        """Return the id of an asset."""
        self.services.assets.invalidate()
        return next(asset.id for asset in self.services.assets.list(kind) if asset.path == path)

    def submit(self, kind: JobKind, **raw: Any) -> Job:
        return self.service.submit(kind, raw, "")

    def run(self, on_report: Callable[[JobContext, dict[str, Any]], None] = lambda context, changes: None) -> Job:
        """Run the next job as the worker does, but raise what its task raises."""
        job = self.services.store.claim()
        assert job is not None
        self.services.job_files.prepare(job)
        models: Any = SimpleNamespace(device=torch.device("cpu"), unload=lambda: None)
        state = JobState.FAILED
        try:
            run_task(ObservedContext(job, self.services, models, on_report=on_report))
            state = JobState.DONE
        except JobInterrupted as interruption:
            state = FINAL_STATES[interruption.signal]
        finally:
            self.services.store.finish(job.id, state)
        return self.services.job_files.find(job.id)
