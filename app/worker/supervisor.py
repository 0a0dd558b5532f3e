"""Keep the worker process alive, from the server."""

from __future__ import annotations

import logging
import threading
from multiprocessing.connection import wait
from typing import Any

from app.config import AppConfig
from app.storage.jobs import JobKind, JobState
from app.storage.store import JobStore
from app.worker.worker import run_worker
from odvae.utils.processes import make_process, process_context

logger = logging.getLogger(__name__)

COMMAND_STOP_TIMEOUT = 90.0  # seconds for a training to write its checkpoint, a cache its shard
STOP_TIMEOUT = 3.0  # seconds for other jobs, which can be killed at any moment
RESTART_DELAY = 1.0  # seconds


class Supervisor:
    """Starts the worker, and restarts it when it dies. `load` loads the pipeline (None: the default); it is sent to the
    worker process, so it must be a function of a module."""

    def __init__(self, config: AppConfig, store: JobStore, load: Any = None) -> None:
        self._config, self._store, self._load = config, store, load
        # Preloaded, so that a restarted worker has it at once.
        self._context = process_context("app.inference.model_manager")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lvdm-supervisor", daemon=True)
        self._process: Any = None

    def start(self) -> None:
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process ID of the worker, if it is alive."""
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def _keep_alive(self) -> None:
        while not self._stopping.is_set():
            connection, worker_connection = self._context.Pipe()
            self._process = make_process(self._context, run_worker, self._config, self._load, worker_connection)
            self._process.start()
            worker_connection.close()
            wait([self._process.sentinel])
            connection.close()
            if not self._stopping.is_set():
                logger.error("the worker exited with code %s; restarting it", self._process.exitcode)
                self._store.set_value("worker", {"state": "restarting", "code": self._process.exitcode})
                self._stopping.wait(RESTART_DELAY)

    def stop(self) -> None:
        """Ask the worker to queue its job again and exit; kill it after a timeout. Harmless if none was started."""
        self._stopping.set()
        process = self._process
        if process is not None and process.is_alive():
            process.terminate()
            running = self._store.find(states=[JobState.RUNNING], kinds=[JobKind.TRAIN, JobKind.CACHE])
            process.join(COMMAND_STOP_TIMEOUT if running else STOP_TIMEOUT)
            if process.is_alive():
                process.kill()
        if self._thread.is_alive():
            self._thread.join(5)

