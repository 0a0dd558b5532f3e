"""Does a long video stay what it was? Jumps where groups join, and colour, contrast and sharpness by the second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from odvae.utils.files import write_json
from odvae.utils.plots import curves

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


class Drift:
    """Takes a video in chunks, in constant memory but for a few numbers a frame. Values are of pixels in [0, 1]."""

    def __init__(self, frame_rate: float) -> None:
        self.frame_rate = frame_rate
        self._last: np.ndarray | None = None
        self._frames: list[list[float]] = []  # red, green, blue, contrast, sharpness
        self._changes: list[tuple[float, bool]] = []  # from a frame to the next, and whether groups join there

    def add(self, frames: np.ndarray, join: bool = True) -> None:
        """The next frames, uint8 (t, H, W, 3). `join`: the first of them begins a group, where one was before it."""
        for frame in frames.astype(np.float32) / 255:
            luma = frame @ LUMA
            self._frames.append([*frame.mean(axis=(0, 1)), luma.std(), sharpness(luma)])
            if self._last is not None:
                self._changes.append((float(np.abs(frame - self._last).mean()), join))
            self._last, join = frame, False

    def report(self) -> dict[str, Any]:
        """`jump`: mean change from frame to frame where groups join, against that elsewhere (1: joins are not seen;
        None: nothing moves, or there is no join). `first_to_last`: what changed from the first second to the last:
        the largest difference of a channel's mean, and the ratios of contrast and sharpness. `seconds`: by second."""
        frames = np.array(self._frames)
        second = (np.arange(len(frames)) / self.frame_rate).astype(int)
        means = np.stack([frames[second == s].mean(axis=0) for s in range(second[-1] + 1)])
        at_joins, elsewhere = (_mean([c for c, join in self._changes if join == where]) for where in (True, False))
        return {
            "frames": len(frames), "frame_rate": self.frame_rate,
            "change_at_joins": at_joins, "change_elsewhere": elsewhere,
            "jump": at_joins / elsewhere if at_joins is not None and elsewhere else None,
            "first_to_last": {"colour": float(np.abs(means[-1, :3] - means[0, :3]).max()),
                              "contrast": _ratio(means[-1, 3], means[0, 3]),
                              "sharpness": _ratio(means[-1, 4], means[0, 4])},
            "seconds": {name: [float(f"{value:.5g}") for value in means[:, i]]
                        for i, name in enumerate(("red", "green", "blue", "contrast", "sharpness"))}}

    def write(self, beside: Path) -> None:
        """The report as NAME.drift.json beside the video NAME.mp4, and a plot of it as NAME.drift.png."""
        report = self.report()
        write_json(beside.with_suffix(".drift.json"), report)
        series = {name: (list(range(len(values))), [value / values[0] for value in values])
                  for name, values in report["seconds"].items() if values[0]}
        jump = "" if report["jump"] is None else f", jump at joins {report['jump']:.2f}"
        curves(series, beside.with_suffix(".drift.png"), f"{beside.stem[:50]}{jump}", "second", "against the first")


def sharpness(luma: np.ndarray) -> float:
    """Variance of the Laplacian (4 neighbours, inside) of a picture (H, W) in [0, 1]; 0 where it is too small."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    return float((luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner).var())


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _ratio(last: float, first: float) -> float | None:
    return float(last / first) if first else None
