"""What jobs do, a module for each kind. Each one has

    settle(raw, rooms, owner) -> (params, title)   in the server: checks what came in, completely, and raises UserError;
                                                   returns JSON with every value that is used, and what to call the job
    run(desk)                                      in the worker: makes it; goes on where an earlier run was broken off

and imports torch nowhere but inside `run`: the server lives without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from app.desk import Desk, Rooms
from app.jobs import Kind


class Task(Protocol):
    def settle(self, raw: Mapping[str, Any], rooms: Rooms, owner: str) -> tuple[dict[str, Any], str]: ...

    def run(self, desk: Desk) -> None: ...


_MODULES = {Kind.GENERATE: "generate", Kind.DECODE: "decode", Kind.COMPRESS: "compress", Kind.CACHE: "cache",
            Kind.TRAIN: "train"}  # fmt: skip


def task_of(kind: Kind) -> Task:
    return cast(Task, importlib.import_module(f"app.tasks.{_MODULES[kind]}"))
