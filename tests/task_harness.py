"""A worker's desk without a server: submit a job through the door, run its task here and now."""

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

ENDS = {JobSignal.STOP: JobState.STOPPED, JobSignal.PAUSE: JobState.PAUSED, JobSignal.CANCEL: JobState.CANCELLED}


@dataclass
class Watched(JobContext):
    """A desk that tells of each report, before it is made."""

    watch: Callable[[JobContext, dict[str, Any]], None] = lambda context, changes: None

    def report_progress(self, **changes: Any) -> None:
        self.watch(self, changes)
        super().report_progress(**changes)


class TaskHarness:
    """Services in `folder`/data, places below the other folders, and one clerk."""

    def __init__(self, folder: Path, *folders: Path) -> None:
        self.config = AppConfig(data_dir=folder / "data", folders=tuple(folders), workspace=folder / "made")
        self.services = Services.from_config(self.config)
        self.service = JobService(self.services)

    def place(self, kind: Any, path: Path) -> str:
        """The id of a place."""
        self.services.assets.invalidate()
        return next(one.id for one in self.services.assets.list(kind) if one.path == path)

    def submit(self, kind: JobKind, **raw: Any) -> Job:
        return self.service.submit(kind, raw, "")

    def run(self, watch: Callable[[JobContext, dict[str, Any]], None] = lambda context, changes: None) -> Job:
        """Do the job whose turn it is, as the worker does; what its task raises comes out."""
        job = self.services.store.claim()
        assert job is not None
        self.services.job_files.prepare(job)
        engine: Any = SimpleNamespace(device=torch.device("cpu"), unload=lambda: None)
        end = JobState.FAILED
        try:
            run_task(Watched(job, self.services, engine, watch=watch))
            end = JobState.DONE
        except JobInterrupted as asked:
            end = ENDS[asked.signal]
        finally:
            self.services.store.finish(job.id, end)
        found = self.services.store.get(job.id)
        assert found is not None
        return found
