"""What an executor needs of a worker, whether it is in this process, another one or an actor of Ray."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from ....data.sources import MediaRef
from ..shard_encoder import EncodeUnit


@dataclass(frozen=True)
class ProbeTask:
    """Some files to probe; the result is a list of `MediaInfo` or `VideoError`, in their order."""

    refs: tuple[MediaRef, ...]


Task = EncodeUnit | ProbeTask  # an `EncodeUnit` results in a `CommittedShard`


class WorkerDiedError(RuntimeError):
    """A worker ended before it had finished a task."""


class Worker(Protocol):
    """Runs tasks.

    Attributes:
        name: of its device, unique in the build.
        ready: done once it takes tasks. It fails with what the user must change, or with `WorkerDiedError`.
    """

    name: str
    ready: Future[None]

    def submit(self, task: Task) -> Future[Any]:
        """Begin a task. Its future fails with what the task raised, or with `WorkerDiedError`."""

    def stop(self) -> None:
        """End the worker and all that it has started. What it is at is lost."""


def describe(task: Task) -> str:
    """Name a task and its files, for an error's message."""
    refs = [clip.ref for clip in task.clips] if isinstance(task, EncodeUnit) else list(task.refs)
    files = f"{refs[0]}" if refs[0] == refs[-1] else f"files from {refs[0]} to {refs[-1]}"
    return f"shard {task.name} of partition {task.partition} ({files})" if isinstance(task, EncodeUnit) else files
