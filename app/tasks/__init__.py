"""The tasks, a module for each kind of job. Each has

    validate(raw, services, owner) -> (params, title)   in the server: checks the input or raises UserError; returns
                                                        all parameters, as JSON, and a title
    run(context)                                        in the worker: runs the job; resumes an earlier run

`validate` imports no torch: the server runs without it. Where `run` needs many imports, it has a module of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from app.storage.jobs import JobKind
from app.tasks.context import JobContext, Services


class Task(Protocol):
    def validate(self, raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]: ...


_WORKERS = {JobKind.GENERATE: "generate_worker", JobKind.COMPRESS: "compress_worker"}  # the others have one module


def get_task(kind: JobKind) -> Task:
    """Return the module that validates jobs of a kind. It imports no torch."""
    return cast(Task, importlib.import_module(f"app.tasks.{kind}"))


def run_task(context: JobContext) -> None:
    """Run the job of a context, in the worker. Raises what the task raises."""
    kind = context.job.kind
    importlib.import_module(f"app.tasks.{_WORKERS.get(kind, kind)}").run(context)
