"""A worker's desk without a server: submit a job through the door, run its task here and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from app.config import AppConfig
from app.desk import Asked, Desk, Rooms
from app.door import Door
from app.jobs import Ask, Job, Kind, State
from app.tasks import task_of

ENDS = {Ask.STOP: State.STOPPED, Ask.PAUSE: State.PAUSED, Ask.CANCEL: State.CANCELLED}


@dataclass
class Watched(Desk):
    """A desk that tells of each report, before it is made."""

    watch: Callable[[Desk, dict[str, Any]], None] = lambda desk, changes: None

    def report(self, **changes: Any) -> None:
        self.watch(self, changes)
        super().report(**changes)


class Office:
    """Rooms in `folder`/data, places below the other folders, and one clerk."""

    def __init__(self, folder: Path, *folders: Path) -> None:
        self.config = AppConfig(data_dir=folder / "data", folders=tuple(folders), workspace=folder / "made")
        self.rooms = Rooms.of(self.config)
        self.door = Door(self.rooms)

    def place(self, kind: Any, path: Path) -> str:
        """The id of a place."""
        self.rooms.places.forget()
        return next(one.id for one in self.rooms.places.list(kind) if one.path == path)

    def submit(self, kind: Kind, **raw: Any) -> Job:
        return self.door.submit(kind, raw, "")

    def run(self, watch: Callable[[Desk, dict[str, Any]], None] = lambda desk, changes: None) -> Job:
        """Do the job whose turn it is, as the worker does; what its task raises comes out."""
        job = self.rooms.store.claim()
        assert job is not None
        self.rooms.library.begin(job)
        engine: Any = SimpleNamespace(device=torch.device("cpu"), free=lambda: None)
        end = State.FAILED
        try:
            task_of(job.kind).run(Watched(job, self.rooms, engine, watch=watch))
            end = State.DONE
        except Asked as asked:
            end = ENDS[asked.ask]
        finally:
            self.rooms.store.finish(job.id, end)
        found = self.rooms.store.get(job.id)
        assert found is not None
        return found
