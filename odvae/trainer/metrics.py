"""Metrics of a training: metrics.jsonl, which a resumed run reproduces bit for bit, speed.jsonl, which it cannot, and
the trackers of accelerate."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..utils.errors import UserError
from ..utils.files import write_text
from .throughput import ThroughputMeter

# Packages for each tracker; any one will do.
TRACKERS = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError for a tracker that is not installed; accelerate would silently ignore it."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise UserError(f"loop.trackers names {name}, which is not installed; pip install {TRACKERS[name][0]}, or "
                            f"remove it")


def sample_path(run: Path, step: int) -> Path:
    """Return the path where an evaluation saves its image, from which trackers log it."""
    return run / "samples" / f"step-{step:06d}.png"


class MetricsLogger:
    """Log means of the losses as JSON lines. A resumed run drops the lines after its checkpoint; a run that was stopped
    before its first checkpoint starts over and drops all.

    Attributes:
        lines: all lines written, as dicts.
        sums: every value since the last line; a checkpoint keeps them.
        throughput: since the last line.
    """

    def __init__(self, run: Path, start: int, sums: dict[str, list[float]], accelerator: Accelerator,
                 peak: float | None = None) -> None:
        self.run, self.sums, self.accelerator = run, sums, accelerator
        self.path = run / "metrics.jsonl"
        self.lines: list[dict[str, float]] = []
        if self.path.exists():
            lines = map(json.loads, self.path.read_text().splitlines())
            self.lines = [line for line in lines if 0 < start >= line["step"]]
        if accelerator.is_main_process:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.throughput = ThroughputMeter(accelerator.num_processes, peak)

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value)

    def flush(self, step: int, **more: float) -> dict[str, float]:
        line = {"step": step, **{k: sum(v) / len(v) for k, v in self.sums.items()}, **more}
        self.sums = {}
        self.write(line)
        speed = self.throughput.metrics()
        self._append("speed.jsonl", {"step": step, **{k: float(f"{v:.4g}") for k, v in speed.items()}})
        self.accelerator.log(speed, step)
        self.throughput.reset()
        return line | speed

    def write(self, line: dict[str, float]) -> None:
        self.lines.append(line)
        self._append("metrics.jsonl", line)
        step = int(line["step"])
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step)

    def log_image(self, step: int) -> None:
        """Log the evaluation's image, if there is one, to the trackers that take images."""
        path = sample_path(self.run, step)
        if not path.exists():
            return
        pixels = np.asarray(Image.open(path).convert("RGB"))
        for tracker in self.accelerator.trackers:
            if tracker.name != "trackio":  # takes no images
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels[None]}, step, **layout)

    def _append(self, name: str, line: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.run / name).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def best_step(self, metric: str, best_is: str) -> int | None:
        """Return the step > 0 whose evaluation had the best finite `metric` so far, the first of equals, or None."""
        lines = [line for line in self.lines if line["step"] and math.isfinite(line.get(metric, math.nan))]
        sign = 1 if best_is == "highest" else -1
        return int(max(lines, key=lambda line: sign * line[metric])["step"]) if lines else None

    def close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
