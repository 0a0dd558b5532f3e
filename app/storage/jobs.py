"""A job: something that was asked for, from the queue to its end. Whose turn is next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4


class JobKind(StrEnum):
    """What a job makes; `app.tasks` has a module for each."""

    GENERATE = "generate"  # a video
    DECODE = "decode"  # a video once more, from the latents that another job kept
    COMPRESS = "compress"  # a video's latents, and what the OD-VAE keeps of it
    CACHE = "cache"  # a latent cache of a folder of videos
    TRAIN = "train"  # a model


class JobState(StrEnum):
    """QUEUED -> RUNNING -> an end. PAUSED goes back to QUEUED, and so does what runs when the server dies."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"  # ended early; what was finished is kept
    CANCELLED = "cancelled"  # ended early; nothing is kept
    FAILED = "failed"

    @property
    def active(self) -> bool:
        return self in (JobState.QUEUED, JobState.RUNNING)

    @property
    def ended(self) -> bool:
        return self in (JobState.DONE, JobState.STOPPED, JobState.CANCELLED, JobState.FAILED)


class JobSignal(StrEnum):
    """What somebody wants of a job that runs. It is heard at the job's next report."""

    NOTHING = ""
    PAUSE = "pause"
    STOP = "stop"
    CANCEL = "cancel"
    SHUTDOWN = "shutdown"  # the server ends: back into the queue, first


@dataclass(frozen=True)
class Progress:
    """How far a job is. `done` of `total` counts the whole job; the other counts are from 1 and say where it is."""

    phase: str = "waiting"  # a word of the task's: loading, text, sampling, decoding, ...
    detail: str = ""  # a line more
    done: float = 0
    total: float = 0
    group: int = 0  # of latents, of a video that is being made
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
    params: dict[str, Any]  # as the task of this kind checked them
    title: str  # what it is called and found by: the prompt, the file's name
    created: float
    position: float = 0  # in its owner's queue
    started: float | None = None
    finished: float | None = None
    progress: Progress = field(default_factory=Progress)
    signal: JobSignal = JobSignal.NOTHING
    revision: int = 0  # counts what was published: files in the folder, `result`
    result: dict[str, Any] = field(default_factory=dict)  # what came out, in the task's words
    notes: tuple[str, ...] = ()  # what the user should know: less memory than wished, restarts
    error: str = ""
    advice: str = ""
    favorite: bool = False
    priority: bool = False  # it ran when the server died: before all others
    attempts: int = 0  # starts since it last got on
    parent: str = ""  # the job that it goes on from


def round_robin_order(queued: Iterable[Job], served: Mapping[str, float]) -> list[Job]:
    """The order in which queued jobs will run: owners take turns, each one's jobs by their position.

    Args:
        served: when each owner's turn was last (seconds since 1970).
    """
    left = sorted(queued, key=lambda job: (job.position, job.created))
    order = [job for job in left if job.priority]
    lines: dict[str, list[Job]] = {}
    for job in left:
        if not job.priority:
            lines.setdefault(job.owner, []).append(job)
    last = dict(served)
    clock = max(last.values(), default=0.0)
    while lines:
        owner = min(lines, key=lambda name: (last.get(name, 0.0), lines[name][0].created))
        order.append(lines[owner].pop(0))
        clock += 1
        last[owner] = clock
        if not lines[owner]:
            del lines[owner]
    return order


def new_id() -> str:
    """A name that cannot be guessed and is safe in a path and in a URL."""
    return uuid4().hex


def is_id(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) is not None
