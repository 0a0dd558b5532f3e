"""Jobs, their states, and the order in which they run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4


class JobKind(StrEnum):
    """The kinds of jobs; `app.tasks` has a module for each."""

    GENERATE = "generate"  # a video
    DECODE = "decode"  # decode the latents of another job again
    COMPRESS = "compress"  # a video into latents and back, with metrics
    CACHE = "cache"  # a latent cache of a folder of videos
    TRAIN = "train"  # a model


class JobState(StrEnum):
    """QUEUED -> RUNNING -> one of the last four. PAUSED goes back to QUEUED, and so does RUNNING if the server dies."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"  # ended early; finished parts are kept
    CANCELLED = "cancelled"  # ended early; nothing is kept
    FAILED = "failed"

    @property
    def active(self) -> bool:
        return self in (JobState.QUEUED, JobState.RUNNING)

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.STOPPED, JobState.CANCELLED, JobState.FAILED)


class JobSignal(StrEnum):
    """A request to a running job. It takes effect at the job's next progress report."""

    NOTHING = ""
    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"
    SHUTDOWN = "shutdown"  # the server shuts down: queued again, first


@dataclass(frozen=True)
class Progress:
    """The progress of a job. `done` of `total` is for the whole job; the other numbers start at 1."""

    phase: str = "waiting"  # a name from the task: loading, text, sampling, decoding, ...
    detail: str = ""  # one more line
    done: float = 0
    total: float = 0
    group: int = 0  # of latents, of a video that is being generated
    groups: int = 0
    step: int = 0  # of sampling
    steps: int = 0
    part: int = 0  # of decoding
    parts: int = 0
    frames: int = 0  # in the video so far
    seconds_left: float | None = None

    @property
    def fraction(self) -> float:
        """In [0, 1]."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total else 0.0


@dataclass(frozen=True)
class Job:
    """One row of the store. Times are seconds since 1970."""

    id: str
    kind: JobKind
    owner: str  # a user's name, or a visitor's id
    state: JobState
    params: dict[str, Any]  # as the task of this kind validated them
    title: str  # for display and search: the prompt, the file name
    created: float
    position: float = 0  # in its owner's queue
    started: float | None = None
    finished: float | None = None
    progress: Progress = field(default_factory=Progress)
    signal: JobSignal = JobSignal.NOTHING
    revision: int = 0  # number of updates of `result` and of files in the folder
    result: dict[str, Any] = field(default_factory=dict)  # defined by the task
    notes: tuple[str, ...] = ()  # for the user: memory fallbacks, restarts
    error: str = ""
    advice: str = ""
    favorite: bool = False
    priority: bool = False  # it was running when the server died: before all others
    attempts: int = 0  # starts since its last progress
    parent: str = ""  # the job whose video it extends or decodes
    worker: int | None = None  # the number of the worker that runs it, or ran it last


def round_robin_order(queued: Iterable[Job], served: Mapping[str, float]) -> list[Job]:
    """Return queued jobs in the order in which they will run: owners take turns, with their jobs by position.

    Args:
        served: when each owner last had a turn (seconds since 1970).
    """
    by_position = sorted(queued, key=lambda job: (job.position, job.created))
    order = [job for job in by_position if job.priority]
    queues: dict[str, list[Job]] = {}
    for job in by_position:
        if not job.priority:
            queues.setdefault(job.owner, []).append(job)
    last = dict(served)
    clock = max(last.values(), default=0.0)
    while queues:
        owner = min(queues, key=lambda name: (last.get(name, 0.0), queues[name][0].created))
        order.append(queues[owner].pop(0))
        clock += 1
        last[owner] = clock
        if not queues[owner]:
            del queues[owner]
    return order


def new_id() -> str:
    """Return a random name that is safe in a path and in a URL."""
    return uuid4().hex


def is_id(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) is not None
