"""Processes that have done nothing yet."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext


def fresh_processes(*modules: str) -> BaseContext:
    """The context to start processes by that have done nothing but import `modules`: forked from one that did so once,
    where the system can, as that takes many seconds with torch and diffusers."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context
