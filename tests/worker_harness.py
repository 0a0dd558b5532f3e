"""A job service with workers in threads, which load the scripted pipeline."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import scripted_pipeline
from waiting import TIMEOUT, wait_for

from app.api.service import JobService
from app.config import AppConfig
from app.storage.jobs import Job, JobKind
from app.tasks.context import Services
from app.worker.worker import Worker

OWNER = "me"


class WorkerHarness:
    """A service with its data in `folder`, and the workers that were started."""

    def __init__(self, folder: Path, pipeline: Path) -> None:
        self.config = AppConfig(data_dir=folder / "data", pipeline=pipeline, folders=(folder,),
                                workspace=folder / "work")  # fmt: skip
        self.service = JobService(Services.from_config(self.config))
        self._workers: list[tuple[Worker, threading.Thread]] = []

    def submit(self, prompt: str = "red", kind: JobKind = JobKind.GENERATE, owner: str = OWNER, **raw: Any) -> Job:
        settings = (
            {"prompt": prompt, "seconds": 2, "num_inference_steps": 2, "seed": 7} if kind is JobKind.GENERATE else {}
        )
        return self.service.submit(kind, settings | raw, owner)

    def start_worker(self) -> Worker:
        from app.inference.model_manager import ModelManager

        services = Services.from_config(self.config)
        worker = Worker(services, lambda: ModelManager(services.store, scripted_pipeline.load))
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        self._workers.append((worker, thread))
        return worker

    def stop_workers(self) -> None:
        """Stop the workers, as a server does."""
        for worker, thread in self._workers:
            worker.quit.set()
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        self._workers.clear()

    def reload(self, job: Job) -> Job:
        """Return the job as it is now."""
        return self.service.job_files.find(job.id)

    def wait(self, job: Job) -> Job:
        """Wait until a job has ended."""
        wait_for(lambda: self.reload(job).state.ended, f"{job.title} ends")
        return self.reload(job)

    def file(self, job: Job, name: str = "final.mp4") -> Path:
        return self.service.job_files.folder(job) / name
