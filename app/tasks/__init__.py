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

from app.storage.jobs import JobKind
from app.tasks.context import JobContext, Services


class Task(Protocol):
    def validate(self, raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]: ...

    def run(self, context: JobContext) -> None: ...


_MODULES = {JobKind.GENERATE: "generate", JobKind.DECODE: "decode", JobKind.COMPRESS: "compress",
            JobKind.CACHE: "cache", JobKind.TRAIN: "train"}  # fmt: skip


def get_task(kind: JobKind) -> Task:
    return cast(Task, importlib.import_module(f"app.tasks.{_MODULES[kind]}"))
