"""Drift of a long video: jumps where groups join, and colour, contrast and sharpness per second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from odvae.utils.files import write_json
from odvae.utils.plots import curves

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601


class Drift:
    """Measures a video given in chunks; keeps only a few numbers per frame. Values are for pixels in [0, 1]."""

    def __init__(self, frame_rate: float) -> None:
        self.frame_rate = frame_rate
        self._last: np.ndarray | None = None
        self._frames: list[list[float]] = []  # red, green, blue, contrast, sharpness
        self._changes: list[tuple[float, bool]] = []  # from a frame to the next, and whether a group starts there

    def add(self, frames: np.ndarray, join: bool = True) -> None:
        """Add the next frames, uint8 (t, H, W, 3). `join`: the first of them starts a group that follows another."""
        for frame in frames.astype(np.float32) / 255:
            luma = frame @ LUMA
            self._frames.append([*frame.mean(axis=(0, 1)), luma.std(), sharpness(luma)])
            if self._last is not None:
                self._changes.append((float(np.abs(frame - self._last).mean()), join))
            self._last, join = frame, False

    def report(self) -> dict[str, Any]:
        """Return the figures.

        `jump` is the mean change between frames where groups join / elsewhere (1: joins are invisible; None: nothing
        moves, or there is no join). `first_to_last` compares the last second with the first: the largest difference of
        a channel's mean, and the ratios of contrast and sharpness. `seconds` has the values per second."""
        frames = np.array(self._frames)
        second = (np.arange(len(frames)) / self.frame_rate).astype(int)
        means = np.stack([frames[second == s].mean(axis=0) for s in range(second[-1] + 1)])
        at_joins, elsewhere = (_mean([c for c, join in self._changes if join == at_join]) for at_join in (True, False))
        return {
            "frames": len(frames), "frame_rate": self.frame_rate,
            "change_at_joins": at_joins, "change_elsewhere": elsewhere,
            "jump": at_joins / elsewhere if at_joins is not None and elsewhere else None,
            "first_to_last": {"colour": float(np.abs(means[-1, :3] - means[0, :3]).max()),
                              "contrast": _ratio(means[-1, 3], means[0, 3]),
                              "sharpness": _ratio(means[-1, 4], means[0, 4])},
            "seconds": {name: [float(f"{value:.5g}") for value in means[:, i]]
                        for i, name in enumerate(("red", "green", "blue", "contrast", "sharpness"))}}

    def write(self, video: Path) -> None:
        """Write the report to NAME.drift.json beside the video NAME.mp4, and a plot of it to NAME.drift.png."""
        report = self.report()
        write_json(video.with_suffix(".drift.json"), report)
        series = {name: (list(range(len(values))), [value / values[0] for value in values])
                  for name, values in report["seconds"].items() if values[0]}
        jump = "" if report["jump"] is None else f", jump at joins {report['jump']:.2f}"
        curves(series, video.with_suffix(".drift.png"), f"{video.stem[:50]}{jump}", "second", "relative to the first")


def sharpness(luma: np.ndarray) -> float:
    """Variance of the Laplacian (4 neighbours, inside) of a picture (H, W) in [0, 1]; 0 if it is too small."""
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    return float((luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner).var())


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _ratio(last: float, first: float) -> float | None:
    return float(last / first) if first else None
