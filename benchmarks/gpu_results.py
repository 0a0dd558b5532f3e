"""What the parts of `gpu.py` are and what they return."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """A figure, or a check that passed or failed.

    Attributes:
        value: None for a check without a figure.
        limit: what the value must not exceed; None: it is only reported.
    """

    what: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    ok: bool | None = None

    def __post_init__(self) -> None:
        if self.ok is None and self.limit is not None and self.value is not None:
            object.__setattr__(self, "ok", self.value <= self.limit)  # False for NaN

    def __str__(self) -> str:
        what, value, unit, limit, ok = self.cells
        bound = f" (at most {limit})" if limit else ""
        return " ".join(word for word in (what, value, unit + bound, ok) if word)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        numbers = ("" if x is None else f"{x:.4g}" for x in (self.value, self.limit))
        value, limit = numbers
        return self.what, value, self.unit, limit, {None: "", True: "ok", False: "FAILED"}[self.ok]

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Part:
    """One part of the run, of about a minute at most."""

    name: str
    run: Callable[[torch.device], Iterator[Result]]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, budget: float = 3.0) -> float:
    """Return the median seconds of a call, repeated for about `budget` seconds (on a CPU: once) after a warm-up."""
    call()
    times: list[float] = []
    start = time.perf_counter()
    while not times or (device.type != "cpu" and time.perf_counter() - start < budget and len(times) < 50):
        synchronize(device)
        before = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Return the GiB that were allocated at most during a call; None on a device that does not count them."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 2**30
