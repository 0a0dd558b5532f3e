"""A worker in a process of this machine, for each of several devices."""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import threading
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from ....utils.processes import make_process, process_context
from ..decode_pool import fork_server_here
from ..usage import Usage
from .runner import RunnerSpec
from .worker import Outcome, Task, WorkerDiedError


class ProcessWorker:
    """A `Worker` in a process of its own, which ends with this one.

    Args:
        name: unique in the build.
        device: of torch.
        tensors: of the VAE.
        threads: of the encoder, if OMP_NUM_THREADS does not say otherwise.
    """

    def __init__(self, name: str, device: str, spec: RunnerSpec, tensors: bytes, decoders: int,
                 threads: int) -> None:
        self.name, self.ready, self.decoders, self.usage = name, Future[None](), decoders, Usage()
        self._futures: dict[int, Future[Any]] = {0: self.ready}
        self._numbers = itertools.count(1)
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._is_dead = False
        self._connection, theirs = Pipe()
        context = process_context(__name__)
        self._process = make_process(context, run_worker, theirs, int(os.environ.get("OMP_NUM_THREADS", threads)))
        self._process.daemon = True
        self._process.start()
        theirs.close()
        threading.Thread(target=self._receive, args=(device, spec, tensors, decoders), daemon=True).start()

    def submit(self, task: Task) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            is_dead = self._is_dead
            if not is_dead:
                number = next(self._numbers)
                self._futures[number] = future
        if is_dead:
            future.set_exception(WorkerDiedError("the process has ended"))
        else:
            with self._sending, suppress(OSError):  # `_receive` finds that the process has ended
                self._connection.send((number, task))
        return future

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self, device: str, spec: RunnerSpec, tensors: bytes, decoders: int) -> None:
        """Send what the process needs, then receive results, in a thread, until the process ends."""
        with suppress(OSError, EOFError):
            self._connection.send((device, spec, decoders))
            self._connection.send_bytes(tensors)
            while True:
                number, outcome = self._connection.recv()
                with self._lock:
                    future = self._futures.pop(number)
                outcome.settle(future, self.usage)
        self._process.join()
        with self._lock:
            self._is_dead, futures = True, list(self._futures.values())
            self._futures.clear()
        self._connection.close()
        for future in futures:
            future.set_exception(WorkerDiedError(f"the process has ended with status {self._process.exitcode}"))


def run_worker(connection: Connection, threads: int) -> None:
    """Take tasks until the connection is closed, which also ends the decode workers."""
    fork_server_here()
    torch.set_num_threads(threads)
    stack = ExitStack()
    try:
        device, spec, decoders = connection.recv()
        runner = spec.open(connection.recv_bytes(), device, decoders, stack)
    except EOFError:
        return
    except Exception as error:
        connection.send((0, Outcome(error=portable(error))))
        return
    connection.send((0, Outcome()))
    results: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()

    def send() -> None:  # in a thread: this one always takes tasks, so that no side waits for the other to receive
        while True:
            number, future = results.get()
            error = future.exception()
            outcome = Outcome(None if error else future.result(), portable(error), runner.usage.take())
            with suppress(OSError):
                connection.send((number, outcome))

    threading.Thread(target=send, daemon=True).start()
    while True:
        try:
            number, task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the build has ended
        runner.submit(task).add_done_callback(partial(lambda number, future: results.put((number, future)), number))


def portable(error: BaseException | None) -> BaseException | None:
    """Return an error as another process can take it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
