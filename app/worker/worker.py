"""The process that does the work: it takes the job whose turn it is from the store, and never serves a request.

It may be killed at any moment. The server starts it again, and what ran goes on from what is on the disk.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.storage.job_files import lock
from app.storage.jobs import Job, JobSignal, JobState
from app.tasks import run_task
from app.tasks.context import JobContext, JobInterrupted, Services
from odvae.utils.errors import NonFiniteError

if TYPE_CHECKING:
    from app.inference.model_manager import ModelManager

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # seconds between two looks into the queue
RETRY = 5.0  # seconds, where it cannot be read
KEPT = 30.0  # seconds that a video's chunks outlive its end: a page may still fetch what it has just learnt of

ENDS = {
    JobSignal.PAUSE: JobState.PAUSED,
    JobSignal.STOP: JobState.STOPPED,
    JobSignal.CANCEL: JobState.CANCELLED,
    JobSignal.SHUTDOWN: JobState.QUEUED,
}


class Worker:
    """Works off the queue until `quit` is set. `make_engine` is called here, in the worker's thread or process."""

    def __init__(self, services: Services, make_engine: Callable[[], ModelManager]) -> None:
        self.services, self.store = services, services.store
        self.quit = threading.Event()
        self._make_engine = make_engine
        self._engine: ModelManager | None = None
        self._ended: list[tuple[float, Job]] = []  # when jobs ended whose chunks can go

    def run(self) -> None:
        """What still says "running" goes on first: its worker died."""
        for job in self.store.recover():
            logger.warning("%s %s goes on: the worker had ended", job.kind, job.id)
        self.services.job_files.remove_orphans()
        self._warm_up()
        while not self.quit.is_set():
            try:
                claimed = self.store.claim()
            except sqlite3.Error:  # a full disk, say: it may pass, and this process must not end
                logger.exception("the queue cannot be read; trying again in %g s", RETRY)
                self.quit.wait(RETRY)
                continue
            while self._ended and time.monotonic() - self._ended[0][0] >= KEPT:
                self.services.job_files.remove_previews(self._ended.pop(0)[1])
            if claimed is None:
                self.quit.wait(POLL_SECONDS)
            else:
                self.work(claimed)

    @property
    def engine(self) -> ModelManager:
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def _warm_up(self) -> None:
        """Load the model before anybody waits for it. The first job reports a failure again, readably."""
        from app.inference.model_manager import explain
        from app.tasks.generate import pipeline_folder

        self.store.set_value("worker", {"state": "loading", "pid": os.getpid()})
        try:
            self.engine.pipeline(pipeline_folder("", self.services))
            status: dict[str, Any] = {"state": "ready", "device": str(self.engine.device)}
        except Exception as error:
            logger.error("the model cannot be loaded: %s", " ".join(explain(error)))
            status = {"state": "ready", "error": " ".join(explain(error))}
        self.store.set_value("worker", {**status, "pid": os.getpid()})

    def work(self, job: Job) -> None:
        """One job, to its end. Whatever goes wrong ends this job only."""
        from app.inference.model_manager import explain

        logger.info("%s %s begins: %r", job.kind, job.id, job.title)
        context = JobContext(job, self.services, self.engine, self.quit.is_set)
        state, error, advice = JobState.DONE, "", ""
        began = time.monotonic()
        try:
            self.services.job_files.begin(job)
            context.log("begins")
            run_task(context)
        except JobInterrupted as interruption:
            state = ENDS[interruption.signal]
        except Exception as failure:
            logger.exception("%s %s failed", job.kind, job.id)
            state, (error, advice) = JobState.FAILED, explain(failure)
            with suppress(OSError):
                context.log(f"{error} ({type(failure).__name__}: {failure})")
            if isinstance(failure, NonFiniteError):
                self.services.job_files.discard(job)
            failure.__traceback__ = None  # it holds the tensors of the failed run
            self.engine.free_memory()
        logger.info("%s %s is %s", job.kind, job.id, state)
        with suppress(OSError):
            context.log(f"{state.value} after {time.monotonic() - began:.1f} s")
        self._finish(job, state, error, advice)

    def _finish(self, job: Job, state: JobState, error: str, advice: str) -> None:
        try:
            if state is JobState.CANCELLED:
                self.services.job_files.clear(job)
            self.store.finish(job.id, state, error, advice)
            self._ended.append((time.monotonic(), job))
            options = self.store.get_value("options") or {}
            limit = options.get("max_disk", self.services.config.max_disk)
            for gone in self.services.job_files.enforce_quota(limit, keep=job.id):
                logger.info("deleted %s to make room", gone.id)
        except Exception:  # a full disk takes no note either; the next start goes on with the job
            logger.exception("the end of %s could not be noted", job.id)


def work_for(config: AppConfig, load: Any, line: Any) -> None:
    """The worker's process. `line`: a pipe whose other end the server holds: it is closed when the server is gone,
    however that came about."""
    from app.inference.model_manager import ModelManager
    from odvae.utils.progress import setup_logging

    setup_logging()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of the terminal; the server tells us
    folder = config.data_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _held = lock(folder / ".worker.lock", wait=True)  # one that a killed server has left may still be ending
    services = Services.from_config(config)
    worker = Worker(services, lambda: ModelManager(services.store, load))
    signal.signal(signal.SIGTERM, lambda *_: worker.quit.set())

    def watch() -> None:
        with suppress(EOFError, OSError):
            line.recv()
        if not worker.quit.is_set():
            os._exit(0)  # nobody is there any more; the next worker goes on from what is on the disk

    threading.Thread(target=watch, daemon=True).start()
    worker.run()
