"""What an executor needs of a worker, whether it is in this process, another one or an actor of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from ....data.sources import MediaRef
from ..shard_encoder import EncodeUnit
from ..usage import Usage


@dataclass(frozen=True)
class ProbeTask:
    """Some files to probe; the result is a list of `MediaInfo` or `VideoError`, in their order."""

    refs: tuple[MediaRef, ...]


Task = EncodeUnit | ProbeTask  # an `EncodeUnit` results in a `CommittedShard`


class WorkerDiedError(RuntimeError):
    """A worker ended before it had finished a task."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended in another process, and what that process has spent since the task before."""

    result: Any = None
    error: BaseException | None = None
    spent: Mapping[str, float] = field(default_factory=dict)

    def settle(self, future: Future[Any], usage: Usage) -> None:
        """Set a future, and add to what the worker has spent."""
        usage.add(self.spent)
        if self.error is None:
            future.set_result(self.result)
        else:
            future.set_exception(self.error)


class Worker(Protocol):
    """Runs tasks.

    Attributes:
        name: of its device, unique in the build.
        ready: done once it takes tasks. It fails with what the user must change, or with `WorkerDiedError`.
        decoders: number of its decode workers.
        usage: what its tasks have spent, as far as they have ended.
    """

    name: str
    ready: Future[None]
    decoders: int
    usage: Usage

    def submit(self, task: Task) -> Future[Any]:
        """Begin a task. Its future fails with what the task raised, or with `WorkerDiedError`."""

    def stop(self) -> None:
        """End the worker and all that it has started. What it is at is lost."""


def describe(task: Task) -> str:
    """Name a task and its files, for an error's message."""
    refs = [clip.ref for clip in task.clips] if isinstance(task, EncodeUnit) else list(task.refs)
    files = f"{refs[0]}" if refs[0] == refs[-1] else f"files from {refs[0]} to {refs[-1]}"
    return f"shard {task.name} of partition {task.partition} ({files})" if isinstance(task, EncodeUnit) else files
