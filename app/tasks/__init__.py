"""What jobs do, a module for each kind. Each one has

    validate(raw, services, owner) -> (params, title)   in the server: checks all that came in, and raises
                                                        UserError; returns JSON with every used value, and a title
    run(context)                                        in the worker: does it; resumes where an earlier run ended

The first imports no torch: the server lives without it. Where the second needs much, it is a module of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from app.storage.jobs import JobKind
from app.tasks.context import JobContext, Services


class Task(Protocol):
    def validate(self, raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]: ...


_WORKERS = {JobKind.GENERATE: "generate_worker", JobKind.COMPRESS: "compress_worker"}  # the others are one module


def get_task(kind: JobKind) -> Task:
    """The module that checks what such a job is asked for. It imports no torch."""
    return cast(Task, importlib.import_module(f"app.tasks.{kind}"))


def run_task(context: JobContext) -> None:
    """Do a context's job, in the worker. Raises what the task raises."""
    kind = context.job.kind
    importlib.import_module(f"app.tasks.{_WORKERS.get(kind, kind)}").run(context)
