"""The most memory that something takes, and the seconds: of the accelerator where there is one, else of the process."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
MIB = 2**20


class Usage(NamedTuple):
    """What a call took. MiB are None where nothing tells them."""

    seconds: float
    held: float | None  # MiB before it
    peak: float | None  # MiB at the most during it, what was held before it included

    @property
    def beyond(self) -> float | None:
        """MiB at the peak beyond what was held before."""
        return None if self.held is None or self.peak is None else self.peak - self.held


def profile_call(call: Callable[[], T]) -> tuple[T, Usage]:
    """What a call returns, and what it took."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held: float | None = torch.cuda.memory_allocated() / MIB
    else:
        held = _memory("VmRSS") if _reset_peak() else None
    began = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else None if held is None else _memory("VmHWM")
    return result, Usage(seconds, held, peak)


def _reset_peak() -> bool:
    """Make VmHWM what is held now; False where the system (other than Linux) does not do that."""
    with suppress(OSError, AttributeError):  # what was freed before would be used again, and not be counted
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory(name: str) -> float | None:
    """VmRSS or VmHWM of this process in MiB."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
