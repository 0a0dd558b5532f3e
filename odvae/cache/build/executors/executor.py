"""Distribute the tasks of a build over workers, and give the tasks of a worker that dies to others."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from ....data.sources import MediaRef
from ....data.video.reader import VideoError
from ....utils.errors import UserError
from ...partition import CommittedShard
from ..decode_worker import MediaInfo
from ..shard_encoder import EncodeUnit
from ..usage import Usage
from .worker import ProbeTask, Task, Worker, WorkerDiedError, describe

MAX_DEATHS = 3  # of a task's workers before it is given up, and of a device's workers without any finished task
AT_HAND = 2  # tasks of a kind that a worker has: one is decoded ahead while the other is encoded
PROBE_FILES = 16  # per task
PATIENCE = 60.0  # s without a worker after which a line says so

logger = logging.getLogger(__name__)
Event = tuple["_Job", Any, BaseException | None]  # a task that is done, its result, and its error


@dataclass(eq=False)
class _Job:
    """A task of a call."""

    task: Task
    number: int  # in its call
    events: queue.SimpleQueue[Event | None]  # of its call
    deaths: int = 0  # of workers that had it at hand


@dataclass(eq=False)
class _Slot:
    """A place for a worker: if one dies, another takes it."""

    number: int
    worker: Worker | None = None
    is_given_up: bool = False
    jobs: list[_Job] = field(default_factory=list)  # at hand
    deaths: int = 0  # in a row, without a finished task

    @property
    def is_ready(self) -> bool:
        """Whether it may get a task. A task that may have killed a worker has one for itself."""
        return self.worker is not None and self.worker.ready.done() and not any(job.deaths for job in self.jobs)


class Executor:
    """Probes files and encodes shards by workers, in any order; for two threads, one of which encodes.

    A task whose worker dies runs again, alone on a worker; once it has cost `MAX_DEATHS` workers it is an error.

    Args:
        start: starts the worker of a slot, by its number.
        count: number of slots.
        on_progress: called with the number of clips of each shard that is committed.

    Attributes:
        frames: encoded by each worker, by its name.
        has_lost: whether a worker died.
    """

    def __init__(self, start: Callable[[int], Worker], count: int,
                 on_progress: Callable[[int], object] = lambda _: None) -> None:
        self.frames: Counter[str] = Counter()
        self.has_lost = False
        self._start, self._on_progress = start, on_progress
        self._lock = threading.RLock()
        self._calls: list[queue.SimpleQueue[Event | None]] = []
        self._suspects: deque[_Job] = deque()  # tasks whose worker died
        self._failure: BaseException | None = None
        self._slots = [_Slot(number) for number in range(count)]
        self._usages: list[Usage] = []  # of all workers, also of those that have died

    def __enter__(self) -> Executor:
        with self._lock:
            for slot in self._slots:
                self._start_worker(slot)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        with self._lock:
            workers = [slot.worker for slot in self._slots if slot.worker is not None]
        for worker in workers:
            worker.stop()

    @property
    def encoders(self) -> int:
        """The number of workers that take tasks."""
        return len(self._ready_workers())

    @property
    def decoders(self) -> int:
        """The number of their decode workers."""
        return sum(worker.decoders for worker in self._ready_workers())

    @property
    def usage(self) -> dict[str, float]:
        """What all tasks have spent that have ended, see `Usage`."""
        return dict(sum((Counter(usage.figures()) for usage in self._usages), Counter()))

    def _ready_workers(self) -> list[Worker]:
        with self._lock:
            return [slot.worker for slot in self._slots if slot.worker is not None and slot.worker.ready.done()]

    def cancel(self) -> None:
        """Begin nothing from now on, and end all waits by CancelledError."""
        self._fail(CancelledError())

    def probe(self, refs: Sequence[MediaRef]) -> Iterator[MediaInfo | VideoError]:
        """Probe files, and yield what is known of each, in order."""
        tasks = (ProbeTask(tuple(refs[k : k + PROBE_FILES])) for k in range(0, len(refs), PROBE_FILES))
        done: dict[int, list[MediaInfo | VideoError]] = {}
        first = 0
        for job, result in self._run(tasks):
            done[job.number] = result
            while first in done:
                yield from done.pop(first)
                first += 1

    def encode(self, units: Iterable[EncodeUnit]) -> Iterator[tuple[EncodeUnit, CommittedShard]]:
        """Encode and commit shards, and yield each once it is committed, in any order. Units are taken as they can be
        run.

        Raises:
            OSError: a shard cannot be written; the shards committed before stay.
            UserError: a unit costs every worker that it is given, or there is no worker left.
        """
        for job, shard in self._run(units):
            unit = cast(EncodeUnit, job.task)
            self._on_progress(len(unit.clips))
            yield unit, shard

    def _run(self, tasks: Iterable[Task]) -> Iterator[tuple[_Job, Any]]:
        """Yield tasks with their results, in any order."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        jobs = (_Job(task, number, events) for number, task in enumerate(tasks))
        self._calls.append(events)
        pending, at_end = 0, False
        try:
            while True:
                begun, ends = self._hand_out(events, jobs)
                pending, at_end = pending + begun, at_end or ends
                if at_end and not pending:
                    return
                if (event := self._wait(events)) is not None:
                    pending -= 1
                    yield event
        except BaseException as error:
            self._fail(error if isinstance(error, Exception) else CancelledError())
            raise
        finally:
            self._calls.remove(events)

    def _hand_out(self, events: queue.SimpleQueue[Event | None], jobs: Iterator[_Job]) -> tuple[int, bool]:
        """Give workers all that they can take; returns how many tasks have begun, and whether there are no more."""
        self._place_suspects()
        begun = 0
        while (slot := self._choose(events)) is not None:
            job = next(jobs, None)
            if job is None:
                return begun, True
            self._submit(slot, job)
            begun += 1
        return begun, False

    def _wait(self, events: queue.SimpleQueue[Event | None]) -> tuple[_Job, Any] | None:
        """Wait for the next result; None if there may be something to hand out. Raises what a task raised."""
        if self._failure is not None:  # of before this call
            raise self._failure
        try:
            event = events.get(timeout=PATIENCE)
        except queue.Empty:
            event = None
            if not any(slot.is_ready or slot.jobs for slot in self._slots):
                logger.warning("waiting for a worker; it has not started yet")
        if self._failure is not None:
            raise self._failure
        if event is None:
            return None
        job, result, error = event
        if error is not None:
            raise error
        return job, result

    def _choose(self, events: queue.SimpleQueue[Event | None]) -> _Slot | None:
        """Choose the worker that gets a call's next task; none while a suspect waits for a worker of its own."""
        with self._lock:
            counts = {slot: sum(job.events is events for job in slot.jobs) for slot in self._slots if slot.is_ready}
            slot = min(counts, key=lambda slot: counts[slot], default=None)
            return slot if slot and counts[slot] < AT_HAND and not self._suspects else None

    def _place_suspects(self) -> None:
        with self._lock:
            for slot in self._slots:
                if self._suspects and slot.is_ready and not slot.jobs:
                    self._submit(slot, self._suspects.popleft())

    def _submit(self, slot: _Slot, job: _Job) -> None:
        with self._lock:
            worker = slot.worker
            if worker is None or self._failure is not None:
                self._suspects.append(job)
                return
            slot.jobs.append(job)
            worker.submit(job.task).add_done_callback(partial(self._finish, slot, worker, job))

    def _finish(self, slot: _Slot, worker: Worker, job: _Job, future: Future[Any]) -> None:
        """Take the result of a task, in any thread."""
        error = CancelledError() if future.cancelled() else future.exception()
        with self._lock:
            slot.jobs.remove(job)
            if isinstance(error, WorkerDiedError):
                job.deaths += 1
                self._replace(slot, worker, error)
                if job.deaths < MAX_DEATHS:
                    self._suspects.append(job)
                else:
                    job.events.put((job, None, UserError(
                        f"{describe(job.task)}: the worker died {job.deaths} times, the last time on {worker.name} "
                        f"({error}); leave out the file that it dies of, or give it more memory")))
            else:
                slot.deaths = 0
                if error is None and isinstance(job.task, EncodeUnit):
                    self.frames[worker.name] += sum(future.result().table["frames"].to_pylist())
                job.events.put((job, None if error else future.result(), error))
            self._wake()

    def _start_worker(self, slot: _Slot) -> None:
        slot.worker = worker = self._start(slot.number)
        self._usages.append(worker.usage)
        worker.ready.add_done_callback(partial(self._handle_start, slot, worker))

    def _handle_start(self, slot: _Slot, worker: Worker, ready: Future[None]) -> None:
        error = CancelledError() if ready.cancelled() else ready.exception()
        if isinstance(error, WorkerDiedError):
            self._replace(slot, worker, error)
        elif error is not None:
            self._fail(error)
        self._wake()

    def _replace(self, slot: _Slot, worker: Worker, error: WorkerDiedError) -> None:
        """Start another worker for one that died, unless its device lets all of them die."""
        with self._lock:
            if slot.worker is not worker or self._failure is not None:
                return
            logger.warning("%s: %s", worker.name, error)
            worker.stop()
            self.has_lost = True
            slot.deaths += 1
            if slot.deaths <= MAX_DEATHS:
                self._start_worker(slot)
                return
            slot.worker, slot.is_given_up = None, True
            logger.warning("%s is not used any more: %d workers died there", worker.name, slot.deaths)
            if all(one.is_given_up for one in self._slots):
                self._fail(UserError(f"no worker is left; the last one, on {worker.name}, died: {error}"))

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        for events in list(self._calls):
            events.put(None)
