"""What a task works with: its job and folder, the models, progress reports and the signals it gets."""

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

WRITTEN = 0.2  # seconds between two notes of progress; what starts a new phase, group or chunk is written at once


@dataclass(frozen=True)
class Services:
    """What the server and the worker share."""

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
        return cls(config, library, Uploads(folder / "uploads", config.max_upload, config.max_upload_seconds),
                   AssetCatalog(config.roots()))


class JobInterrupted(Exception):  # noqa: N818  (no error: raised by `JobContext.report_progress` when somebody wants the job to end)
    """Somebody wants the job paused, stopped or cancelled, or the server ends. A task that has something to complete
    catches it, completes it, and raises it again."""

    def __init__(self, ask: JobSignal) -> None:
        super().__init__(ask.value)
        self.signal = ask


@dataclass
class JobContext:
    """The task's hands. `job` is as it was when it was claimed."""

    job: Job
    services: Services
    models: ModelManager
    quitting: Callable[[], bool] = field(default=lambda: False)  # does the server end?
    progress: Progress = field(default_factory=Progress)
    _written: float = 0.0

    @property
    def folder(self) -> Path:
        """The job's own; it is there."""
        return self.services.job_files.folder(self.job)

    def report_progress(self, **changes: Any) -> None:
        """Tell how far the job is, by `Progress`'s fields; call it often. Raises JobInterrupted where it is to end."""
        old, self.progress = self.progress, replace(self.progress, **changes)
        new = self.progress
        turned = (old.phase, old.group, old.part, old.frames) != (new.phase, new.group, new.part, new.frames)
        ask = JobSignal.NOTHING
        if turned or time.monotonic() - self._written >= WRITTEN:
            ask = self.services.store.set_progress(self.job.id, new)
            self._written = time.monotonic()
        if self.quitting():
            ask = ask or JobSignal.SHUTDOWN
        if ask:
            raise JobInterrupted(ask)

    def update_result(self, **result: object) -> None:
        """Something new is to be seen: files of the folder; `result` is added to the job's."""
        self.services.store.update_result(self.job.id, **result)

    def note(self, text: str) -> None:
        """Tell the user something that is to stay with the job; the same thing once."""
        self.services.store.note(self.job.id, text)
        self.log(text)

    def log(self, line: str) -> None:
        """A line into the job's log.txt."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
