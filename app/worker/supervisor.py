"""Keep the worker processes alive, from the server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from app.config import AppConfig
from app.storage.jobs import JobKind, JobState
from app.storage.store import JobStore
from app.worker.devices import send_device_count, worker_environment
from app.worker.worker import run_worker
from odvae.utils.processes import make_process, process_context

logger = logging.getLogger(__name__)

COMMAND_STOP_TIMEOUT = 90.0  # seconds for a training to write its checkpoint, a cache its shard
STOP_TIMEOUT = 3.0  # seconds for other jobs, which can be killed at any moment
RESTART_DELAY = 1.0  # seconds


class Supervisor:
    """Starts the workers, one on each accelerator or as many as the configuration says, and restarts each that dies.
    `load` loads the pipeline (None: the default); it is sent to the worker processes, so it must be a function of a
    module."""

    def __init__(self, config: AppConfig, store: JobStore, load: Any = None) -> None:
        self._config, self._store, self._load = config, store, load
        # Preloaded, so that a restarted worker has it at once.
        self._context = process_context("app.inference.model_manager")
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # of the two below
        self._processes: dict[int, Any] = {}  # by the number of their worker
        self._threads = [threading.Thread(target=self._start_workers, name="lvdm-supervisor", daemon=True)]

    def start(self) -> None:
        self._store.clear_workers()  # those of an earlier server
        self._threads[0].start()

    def _start_workers(self) -> None:
        devices = self._count_devices()
        count = self._config.workers or max(1, devices)
        for number in range(count):
            self._store.set_worker(number, "starting")
            environment = worker_environment(number, count, devices)
            thread = threading.Thread(target=self._keep_alive, args=(number, count, environment), daemon=True,
                                      name=f"lvdm-supervisor-{number}")
            with self._lock:
                self._threads.append(thread)
            thread.start()

    def _count_devices(self) -> int:
        connection, theirs = self._context.Pipe()
        process = make_process(self._context, send_device_count, theirs)
        process.start()
        theirs.close()
        count = 0
        try:
            count = connection.recv()
        except EOFError:
            logger.error("the accelerators cannot be counted: torch crashed; the workers share what there is")
        process.join()
        return count

    def _keep_alive(self, number: int, count: int, environment: Mapping[str, str]) -> None:
        while not self._stopping.is_set():
            connection, worker_connection = self._context.Pipe()
            process = make_process(self._context, run_worker, self._config, self._load, worker_connection, number,
                                   count, environment=environment)
            with self._lock:
                if self._stopping.is_set():
                    return
                process.start()
                self._processes[number] = process
            worker_connection.close()
            wait([process.sentinel])
            connection.close()
            if not self._stopping.is_set():
                logger.error("worker %d exited with code %s; restarting it", number, process.exitcode)
                with suppress(Exception):  # such as a full disk
                    self._store.set_worker(number, "restarting", code=process.exitcode)
                self._stopping.wait(RESTART_DELAY)

    def stop(self) -> None:
        """Ask the workers to queue their jobs again and exit; kill them after a timeout. Harmless if none was
        started."""
        self._stopping.set()
        with self._lock:
            processes = {number: process for number, process in self._processes.items() if process.is_alive()}
            threads = [thread for thread in self._threads if thread.is_alive()]
        for process in processes.values():
            process.terminate()
        commands = {job.worker for job in self._store.find(states=[JobState.RUNNING],
                                                           kinds=[JobKind.TRAIN, JobKind.CACHE], limit=-1)}
        began = time.monotonic()
        for number in sorted(processes, key=commands.__contains__):  # those with commands last
            timeout = COMMAND_STOP_TIMEOUT if number in commands else STOP_TIMEOUT
            processes[number].join(max(0.0, began + timeout - time.monotonic()))
            if processes[number].is_alive():
                processes[number].kill()
        for thread in threads:
            thread.join(5)
