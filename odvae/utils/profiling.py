"""Measure the peak memory and the time of a call: memory on CUDA's device if there is one, else of the process."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .devices import synchronize

T = TypeVar("T")
MIB = 2**20


class Usage(NamedTuple):
    """Time and memory of a call. MiB are None where the system does not report them."""

    seconds: float
    before: float | None  # MiB before the call
    peak: float | None  # MiB at the peak of the call, including `before`

    @property
    def growth(self) -> float | None:
        """MiB at the peak above `before`."""
        return None if self.before is None or self.peak is None else self.peak - self.before


def profile_call(call: Callable[[], T]) -> tuple[T, Usage]:
    """Return the result of a call, and its usage."""
    cuda = torch.cuda.is_available()
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before: float | None = torch.cuda.memory_allocated() / MIB
    else:
        before = _memory("VmRSS") if _reset_peak() else None
    start = time.perf_counter()
    result = call()
    synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else None if before is None else _memory("VmHWM")
    return result, Usage(seconds, before, peak)


def _reset_peak() -> bool:
    """Reset VmHWM to the current memory; False where the system does not support it (only Linux does)."""
    with suppress(OSError, AttributeError):  # freed memory that is still held would be reused, and not be counted
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(name: str) -> float | None:
    """Return VmRSS or VmHWM of this process in MiB."""
    try:
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(match[1]) / 1024 if match else None
