"""Start clean processes quickly, from a fork server that has imported the heavy modules."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any


def process_context(*modules: str) -> BaseContext:
    """Return the context to start processes that have only imported `modules`. Where the system supports it they are
    forked from a server that did so once, because importing torch and diffusers takes many seconds."""
    # diffusers asks for CUDA when it is imported. By the runtime, the default, that initializes CUDA in the server, and
    # then no process that is forked from it can use a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def make_process(context: BaseContext, target: Callable[..., object], *args: Any,
                  environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Create a process of `context`, not yet started, that calls `target(*args)` with this process's environment
    variables, or with `environment`, instead of those of the fork server."""
    variables = dict(os.environ if environment is None else environment)
    process: BaseProcess = context.Process(target=_call, args=(variables, target, args))  # type: ignore[attr-defined]
    return process


def _call(environment: Mapping[str, str], target: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
