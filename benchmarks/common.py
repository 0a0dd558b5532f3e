"""Shared by all benchmarks: interleaved timing, and results as JSON lines with config, hardware and versions."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results.jsonl"


def interleaved(calls: Mapping[str, Callable[[], object]], runs: int = 5) -> dict[str, float]:
    """Return the median seconds of each call over `runs` rounds A B C A B C ..., after a warm-up round; with one run,
    for calls of minutes, there is no warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(runs if runs == 1 else runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ or runs == 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(map(str, headers)), *[[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def record(question: str, config: Mapping[str, Any], figures: Any) -> None:
    """Append one JSON line to results.jsonl."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    line = {"question": question, "config": dict(config), "figures": figures, "commit": commit,
            "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
            "threads": torch.get_num_threads(), "command": " ".join(sys.argv)}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []
    return names[0] if names else platform.processor()
