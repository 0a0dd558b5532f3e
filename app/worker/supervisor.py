"""Keeps the worker's process alive, from the server."""

from __future__ import annotations

import logging
import threading
from multiprocessing.connection import wait
from typing import Any

from app.config import AppConfig
from app.storage.jobs import JobKind, JobState
from app.storage.store import JobStore
from app.worker.worker import work_for
from odvae.utils.processes import make_process, process_context

logger = logging.getLogger(__name__)

PATIENCE = 90.0  # seconds for a training to write its checkpoint, a cache its shard
SHORT = 3.0  # for other jobs, which can be killed at any moment
PAUSE = 1.0  # seconds before a worker is started that has just died


class Supervisor:
    """Starts the worker, and starts it again when it dies. `load` makes the pipeline (None: the real one); it goes to
    the other process, so it must be a function of a module."""

    def __init__(self, config: AppConfig, store: JobStore, load: Any = None) -> None:
        self._config, self._store, self._load = config, store, load
        # So that a worker that is started again has it at once.
        self._context = process_context("app.inference.model_manager")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lvdm-supervisor", daemon=True)
        self._process: Any = None

    def start(self) -> None:
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the worker that lives."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def _keep(self) -> None:
        while not self._ending.is_set():
            here, there = self._context.Pipe()
            self._process = make_process(self._context, work_for, self._config, self._load, there)
            self._process.start()
            there.close()
            self._line = here
            wait([self._process.sentinel])
            here.close()
            if not self._ending.is_set():
                logger.error("the worker ended (exit code %s); it is started again", self._process.exitcode)
                self._store.set_value("worker", {"state": "restarting", "code": self._process.exitcode})
                self._ending.wait(PAUSE)

    def stop(self) -> None:
        """Ask the worker to put its job back and end; after a while, end it. Harmless where none was started."""
        self._ending.set()
        process = self._process
        if process is not None and process.is_alive():
            process.terminate()
            running = self._store.find(states=[JobState.RUNNING], kinds=[JobKind.TRAIN, JobKind.CACHE])
            process.join(PATIENCE if running else SHORT)
            if process.is_alive():
                process.kill()
        if self._thread.is_alive():
            self._thread.join(5)

