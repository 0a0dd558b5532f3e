"""Stopping a training by a signal, between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[Callable[[], bool]]:
    """Inside the block, Ctrl-C and SIGTERM are only noted, and the function that it yields tells whether one came. A
    second Ctrl-C stops at once. (Outside the main thread signals cannot be caught, and nothing changes.)"""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
