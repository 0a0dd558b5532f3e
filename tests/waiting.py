"""Wait for another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

TIMEOUT = 300.0  # seconds; only a broken program takes so long, on however busy a machine


def has_ended(process: Any) -> bool:
    """Whether a psutil.Process has ended, though nobody may have collected its status."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def wait_for(condition: Callable[[], Any], description: str, timeout: float = TIMEOUT) -> Any:
    """Poll until the condition is true and return its value."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"timed out after {timeout:g} s: {description}")
        time.sleep(0.01)
    return value
