"""The context of a task: its job and folder, the models, progress reports and signals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.storage.assets import AssetCatalog
from app.storage.job_files import JobFiles
from app.storage.jobs import Job, JobSignal, Progress
from app.storage.store import JobStore
from app.storage.uploads import Uploads

if TYPE_CHECKING:
    from app.inference.model_manager import ModelManager

PROGRESS_INTERVAL = 0.2  # seconds between two writes; a new phase, group, part or frame is written at once


@dataclass(frozen=True)
class Services:
    """The storage that the server and the workers share."""

    config: AppConfig
    job_files: JobFiles
    uploads: Uploads
    assets: AssetCatalog

    @property
    def store(self) -> JobStore:
        return self.job_files.store

    @classmethod
    def from_config(cls, config: AppConfig) -> Services:
        folder = config.data_dir.absolute()
        job_files = JobFiles(folder)
        return cls(config, job_files, Uploads(folder / "uploads", config.max_upload, config.max_upload_seconds),
                   AssetCatalog(config.roots()))


class JobInterrupted(Exception):  # noqa: N818  (not an error: `JobContext.report_progress` raises it to end the job)
    """The job is to be paused, stopped or cancelled, or the server shuts down. A task with files to complete
    catches it, completes them, and raises it again."""

    def __init__(self, signal: JobSignal) -> None:
        super().__init__(signal.value)
        self.signal = signal


@dataclass
class JobContext:
    """What a task works with. `job` is as it was when the worker claimed it."""

    job: Job
    services: Services
    models: ModelManager
    shutting_down: Callable[[], bool] = field(default=lambda: False)
    progress: Progress = field(default_factory=Progress)
    _written_at: float = 0.0

    @property
    def folder(self) -> Path:
        """The job's folder, which exists."""
        return self.services.job_files.folder(self.job)

    def report_progress(self, **changes: Any) -> None:
        """Report fields of `Progress`; call it often. Raises JobInterrupted if the job is to end."""
        old, self.progress = self.progress, replace(self.progress, **changes)
        new = self.progress
        advanced = (old.phase, old.group, old.part, old.frames) != (new.phase, new.group, new.part, new.frames)
        signal = JobSignal.NOTHING
        if advanced or time.monotonic() - self._written_at >= PROGRESS_INTERVAL:
            signal = self.services.store.set_progress(self.job.id, new)
            self._written_at = time.monotonic()
        if self.shutting_down():
            signal = signal or JobSignal.SHUTDOWN
        if signal:
            raise JobInterrupted(signal)

    def update_result(self, **result: object) -> None:
        """Announce new files of the folder, and merge `result` into the job's result."""
        self.services.store.update_result(self.job.id, **result)

    def note(self, text: str) -> None:
        """Add a note for the user to the job, and log it; a repeated note is ignored."""
        self.services.store.note(self.job.id, text)
        self.log(text)

    def log(self, line: str) -> None:
        """Append a line to the job's log.txt."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
