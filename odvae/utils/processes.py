"""Processes that have done nothing yet."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any


def fresh_processes(*modules: str) -> BaseContext:
    """The context to start processes by that have done nothing but import `modules`: forked from one that did so once,
    where the system can, as that takes many seconds with torch and diffusers."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def fresh_process(context: BaseContext, target: Callable[..., object], *args: Any,
                  environment: Mapping[str, str] | None = None) -> BaseProcess:
    """A process of `context`, to be started, that calls `target(*args)` with this process's environment variables, or
    those given, rather than with those of the process that it is forked from."""
    variables = dict(os.environ if environment is None else environment)
    process: BaseProcess = context.Process(target=_call, args=(variables, target, args))  # type: ignore[attr-defined]
    return process


def _call(environment: Mapping[str, str], target: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
