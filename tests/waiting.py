"""Wait for another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


def wait_for(condition: Callable[[], Any], description: str, timeout: float = 120.0) -> Any:
    """Poll until the condition is true and return its value; the timeout is only for a broken program."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"timed out after {timeout:g} s: {description}")
        time.sleep(0.01)
    return value
