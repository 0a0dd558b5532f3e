"""A worker process: it claims the next job from the store and runs it; it serves no requests.

It may be killed at any moment. The server restarts it, and the running job resumes from its files, in any worker.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from app.config import AppConfig
from app.storage.job_files import lock
from app.storage.jobs import Job, JobSignal, JobState
from app.tasks import run_task
from app.tasks.conflicts import must_wait
from app.tasks.context import JobContext, JobInterrupted, Services
from app.worker.devices import describe_device, limit_threads
from odvae.utils.errors import NonFiniteError

if TYPE_CHECKING:
    from app.inference.model_manager import ModelManager

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # seconds between two polls of the queue
RETRY_SECONDS = 5.0  # after the queue could not be read
CHUNK_LIFETIME = 30.0  # seconds for which the chunks of a finished video stay: a page may still be fetching them

FINAL_STATES = {
    JobSignal.PAUSE: JobState.PAUSED,
    JobSignal.STOP: JobState.STOPPED,
    JobSignal.CANCEL: JobState.CANCELLED,
    JobSignal.SHUTDOWN: JobState.QUEUED,
}


class Worker:
    """Runs the jobs of the queue until `quit` is set, beside other workers.

    Args:
        make_models: called in the worker's thread or process.
        number: of this worker, from 0.
        count: number of workers.
    """

    def __init__(self, services: Services, make_models: Callable[[], ModelManager], number: int = 0,
                 count: int = 1) -> None:
        self.services, self.store, self.number, self.count = services, services.store, number, count
        self.quit = threading.Event()
        self._make_models = make_models
        self._models: ModelManager | None = None
        self._ended: list[tuple[float, Job]] = []  # jobs whose chunks are still there, with the times of their ends

    def run(self) -> None:
        """Run jobs until `quit` is set, after what crashed workers left has been put in order."""
        with ExitStack() as locks:
            self._recover(locks)
            self._run()

    def _run(self) -> None:
        now = time.monotonic()
        self._ended = [(now, job) for job in self.services.job_files.remove_orphans() if self._succeeds(job.worker)]
        self._warm_up()
        while not self.quit.is_set():
            try:
                claimed = self.store.claim(self.number, partial(must_wait, self.services.config))
            except sqlite3.Error:  # such as a full disk: temporary, so this process must not end
                logger.exception("cannot read the queue; retrying in %g s", RETRY_SECONDS)
                self.quit.wait(RETRY_SECONDS)
                continue
            while self._ended and time.monotonic() - self._ended[0][0] >= CHUNK_LIFETIME:
                self.services.job_files.remove_previews(self._ended.pop(0)[1])
            if claimed is None:
                self.quit.wait(POLL_SECONDS)
            else:
                self.run_job(claimed)

    def _succeeds(self, number: int | None) -> bool:
        """Whether this worker takes over what the worker `number` left. An earlier server may have had more of them."""
        return (number or 0) % self.count == self.number

    def _recover(self, locks: ExitStack) -> None:
        """Queue again what dead workers left running: this one's predecessor, and those of an earlier server, which may
        still be exiting. `locks` then hold their places."""
        running = {job.worker or 0 for job in self.store.find(states=[JobState.RUNNING], limit=-1)}
        for number in sorted({self.number, *filter(self._succeeds, running)}):
            if (held := lock(self.services.job_files.root / f".worker-{number}.lock", wait=True)) is not None:
                locks.callback(held.release)
            for job in self.store.recover(number):
                logger.warning("resuming %s %s after a crash of worker %d", job.kind, job.id, number)

    @property
    def models(self) -> ModelManager:
        if self._models is None:
            self._models = self._make_models()
        return self._models

    def _warm_up(self) -> None:
        """Load the model before the first job. If this fails, the first job reports it to the user."""
        from app.inference.model_manager import explain
        from app.tasks.generate import pipeline_folder

        self.store.set_worker(self.number, "loading", pid=os.getpid())
        try:
            self.models.pipeline(pipeline_folder("", self.services))
            status = {"device": describe_device(self.models.device)}
        except Exception as error:
            logger.error("cannot load the model: %s", " ".join(explain(error)))
            status = {"error": " ".join(explain(error))}
        self.store.set_worker(self.number, "ready", pid=os.getpid(), **status)

    def run_job(self, job: Job) -> None:
        """Run one job to its end. An error ends this job only."""
        from app.inference.model_manager import explain

        logger.info("starting %s %s: %r", job.kind, job.id, job.title)
        context = JobContext(job, self.services, self.models, self.quit.is_set)
        state, error, advice = JobState.DONE, "", ""
        start = time.monotonic()
        try:
            self.services.job_files.prepare(job)
            context.log("started")
            run_task(context)
        except JobInterrupted as interruption:
            state = FINAL_STATES[interruption.signal]
        except Exception as failure:
            logger.exception("%s %s failed", job.kind, job.id)
            state, (error, advice) = JobState.FAILED, explain(failure)
            with suppress(OSError):
                context.log(f"{error} ({type(failure).__name__}: {failure})")
            if isinstance(failure, NonFiniteError):
                self.services.job_files.discard(job)
            failure.__traceback__ = None  # it holds the tensors of the failed run
            self.models.free_memory()
        logger.info("%s %s is %s", job.kind, job.id, state)
        with suppress(OSError):
            context.log(f"{state.value} after {time.monotonic() - start:.1f} s")
        self._finish(job, state, error, advice)

    def _finish(self, job: Job, state: JobState, error: str, advice: str) -> None:
        try:
            if state is JobState.CANCELLED:
                self.services.job_files.clear(job)
            self.store.finish(job.id, state, error, advice)
            self._ended.append((time.monotonic(), job))
            options = self.store.get_value("options") or {}
            limit = options.get("max_disk", self.services.config.max_disk)
            for deleted in self.services.job_files.enforce_quota(limit, keep=job.id):
                logger.info("deleted %s to free disk space", deleted.id)
        except Exception:  # such as a full disk; the job resumes at the next start
            logger.exception("cannot store the end of %s", job.id)


def run_worker(config: AppConfig, load: Any, connection: Any, number: int, count: int) -> None:
    """Run a worker, in its process, on the device that its environment shows.

    Args:
        connection: a pipe to the server, which closes when the server is gone.
        number: of this worker, from 0.
        count: number of workers.
    """
    from app.inference.model_manager import ModelManager
    from odvae.utils.progress import setup_logging

    setup_logging()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the server stops us
    limit_threads()
    services = Services.from_config(config)
    worker = Worker(services, lambda: ModelManager(services.store, load), number, count)
    signal.signal(signal.SIGTERM, lambda *_: worker.quit.set())

    def exit_with_server() -> None:
        with suppress(EOFError, OSError):
            connection.recv()
        if not worker.quit.is_set():
            os._exit(0)  # the server is gone; the next worker resumes the job from its files

    threading.Thread(target=exit_with_server, daemon=True).start()
    worker.run()
