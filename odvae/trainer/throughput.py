"""Throughput of a training, and model FLOPs utilization (MFU) against the device's measured peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..utils.devices import synchronize
from ..utils.files import read_json, write_json

TRAIN_TO_FORWARD = 3  # FLOPs of a step / of its forward pass: backward takes two products for each one of forward


class ThroughputMeter:
    """Measure the throughput between two log lines, without evaluations and checkpoints.

    Args:
        peak: FLOPs per second of one process's device; None: no MFU.
    """

    def __init__(self, processes: int, peak: float | None) -> None:
        self.processes, self.peak = processes, peak
        self.reset()

    def reset(self) -> None:
        self._since, self._excluded, self._data_wait = time.perf_counter(), 0.0, 0.0
        self._counts: dict[str, float] = {}
        self._steps = 0

    def add(self, data_wait: float, counts: dict[str, float]) -> None:
        """Add a step that waited `data_wait` seconds for its data; `counts` are those of "frames", "tokens" and "flops"
        (of forward passes) that are known, over all processes."""
        self._data_wait += data_wait
        self._steps += 1
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + number

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Exclude the time spent inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Return `steps_per_second`; `data_wait` as a share of the time; `frames_per_second` and `tokens_per_second`
        of all processes; `mfu`.

        MFU (PaLM, 2204.02311) = 3 x forward FLOPs / seconds / processes / peak. It counts what the model needs, not
        what the hardware does: 3 x also with gradient checkpointing, which repeats the forward pass, and with a frozen
        base (LoRA), which saves a third.
        """
        seconds = max(time.perf_counter() - self._since - self._excluded, 1e-9)
        metrics = {"steps_per_second": self._steps / seconds, "data_wait": self._data_wait / seconds}
        for name in ("frames", "tokens"):
            if name in self._counts:
                metrics[f"{name}_per_second"] = self._counts[name] / seconds
        if self.peak and "flops" in self._counts:
            metrics["mfu"] = TRAIN_TO_FORWARD * self._counts["flops"] / seconds / self.processes / self.peak
        return metrics


def peak_of_run(run: Path, device: torch.device, precision: str) -> float:
    """Return the FLOPs per second of `device` in the training precision ("no": float32), from `run`/peak.json if that
    is of this device; else measure them and write the file."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    key = {"device": _device_name(device), "dtype": str(dtype).removeprefix("torch.")}
    path = run / "peak.json"
    peak = read_json(path) if path.exists() else {}
    if not isinstance(peak, dict) or {name: peak.get(name) for name in key} != key:
        peak = key | {"flops_per_second": matmul_rate(device, dtype)}
        write_json(path, peak)
    return float(peak["flops_per_second"])


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the FLOPs per second of the fastest product of two square matrices, measured for about `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    rng = torch.Generator(device).manual_seed(0)  # leaves the training's random state alone
    a, b = (torch.randn(side, side, generator=rng, device=device).to(dtype) for _ in range(2))
    fastest, start = float("inf"), time.perf_counter()
    while fastest == float("inf") or time.perf_counter() - start < seconds:
        synchronize(device)
        before = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * side**3 / fastest


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
