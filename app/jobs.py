"""A job: one video that was asked for, from the queue to its end."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

from app.params import Params


class State(StrEnum):
    """QUEUED -> RUNNING -> one of the others. INTERRUPTED: the server stopped in the middle of it."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def active(self) -> bool:
        return self in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True)
class Progress:
    """How far a running job is. Groups and steps are counted as finished ones; `frames` are those in the video."""

    phase: str = "waiting"  # waiting | loading | sampling | decoding
    group: int = 0
    groups: int = 0
    step: int = 0
    steps: int = 0
    frames: int = 0
    seconds_left: float | None = None

    @property
    def fraction(self) -> float:
        """The finished share of all sampling steps, in [0, 1]."""
        total = self.groups * self.steps
        return min(1.0, (self.group * self.steps + self.step) / total) if total else 0.0


@dataclass(frozen=True)
class Job:
    """One row of the store. Times are seconds since 1970; `revision` counts the published versions of the video."""

    id: str
    state: State
    params: Params
    created: float
    started: float | None = None
    finished: float | None = None
    progress: Progress = field(default_factory=Progress)
    cancel_requested: bool = False
    revision: int = 0
    error: str = ""
    advice: str = ""

    @property
    def has_video(self) -> bool:
        return self.revision > 0

    def summary(self) -> dict[str, Any]:
        """What the API says about a job."""
        return {
            "id": self.id,
            "state": self.state.value,
            "settings": {**self.params.model_dump(), "seconds": self.params.seconds},
            "progress": {**vars(self.progress), "fraction": self.progress.fraction},
            "has_video": self.has_video,
            "error": self.error,
            "advice": self.advice,
        }


def new_id() -> str:
    """A name that cannot be guessed and is safe in a path and in a URL."""
    return uuid4().hex


def is_id(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{32}", text) is not None
