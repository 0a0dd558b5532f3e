"""How fast a training is: what an interval of it did, and model FLOPs utilisation against the device's own rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..utils.files import read_json, write_json

TRAINING = 3  # a step's operations / its forward pass's: backward takes two products for each one of forward


class ThroughputMeter:
    """Of an interval between two lines of the log; evaluations and checkpoints do not count.

    Args:
        peak: operations a second of one process's device; None where MFU is not asked for.
    """

    def __init__(self, processes: int, peak: float | None) -> None:
        self.processes, self.peak = processes, peak
        self.begin()

    def begin(self) -> None:
        self._since, self._apart, self._waited = time.perf_counter(), 0.0, 0.0
        self._done: dict[str, float] = {}
        self._steps = 0

    def add(self, waited: float, done: dict[str, float]) -> None:
        """A step waited `waited` seconds for its data; `done` are "frames", "tokens" and "flops" (of forward passes) in
        all processes together, those of them that are known."""
        self._waited += waited
        self._steps += 1
        for name, number in done.items():
            self._done[name] = self._done.get(name, 0.0) + number

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """What is done inside is no training and takes none of its time."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._apart += time.perf_counter() - begun

    def figures(self) -> dict[str, float]:
        """`steps_per_second`; `data_wait`: share of the time; `frames_per_second` and `tokens_per_second`: of all
        processes; `mfu`.

        MFU (PaLM, 2204.02311) = 3 x forward FLOPs / seconds / processes / peak. It counts what the model needs, not
        what the hardware does: 3 x also with gradient checkpointing, which runs the forward pass a second time, and
        also where a frozen base (LoRA) spares a third of it.
        """
        seconds = max(time.perf_counter() - self._since - self._apart, 1e-9)
        figures = {"steps_per_second": self._steps / seconds, "data_wait": self._waited / seconds}
        for name in ("frames", "tokens"):
            if name in self._done:
                figures[f"{name}_per_second"] = self._done[name] / seconds
        if self.peak and "flops" in self._done:
            figures["mfu"] = TRAINING * self._done["flops"] / seconds / self.processes / self.peak
        return figures


def peak_of_run(run: Path, device: torch.device, precision: str) -> float:
    """Operations a second of `device` in the precision that is trained in ("no": float32), from `run`/peak.json where
    it is of this device; else measured and written there."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    of = {"device": _name(device), "dtype": str(dtype).removeprefix("torch.")}
    path = run / "peak.json"
    known = read_json(path) if path.exists() else {}
    if not isinstance(known, dict) or {key: known.get(key) for key in of} != of:
        known = of | {"flops_per_second": matmul_rate(device, dtype)}
        write_json(path, known)
    return float(known["flops_per_second"])


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of the fastest of some products of two square matrices; takes about `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    rng = torch.Generator(device).manual_seed(0)  # its own: the training's randomness is not touched
    a, b = (torch.randn(side, side, generator=rng, device=device).to(dtype) for _ in range(2))
    fastest, begun = float("inf"), time.perf_counter()
    while fastest == float("inf") or time.perf_counter() - begun < seconds:
        _wait_for(device)
        since = time.perf_counter()
        torch.mm(a, b)
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - since)
    return 2 * side**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
