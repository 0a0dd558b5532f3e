"""A generated video as an evaluation remembers it: not its frames, but what is asked of them later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..generation.drift import Drift
from .scenes import MEASURED

THUMBNAILS = 8  # pictures of a video in a contact sheet


class VideoStats:
    """Takes a video of `frames` frames in chunks.

    Attributes:
        drift: as it goes on.
        glimpses: evenly spaced pictures (H, W, 3), the first and the last among them.
        whole: all its chunks, where they are asked for; else None.
    """

    def __init__(self, frames: int, frame_rate: float, whole: bool = False) -> None:
        self.drift = Drift(frame_rate)
        self.glimpses: list[np.ndarray] = []
        self.whole: list[np.ndarray] | None = [] if whole else None
        self._glimpsed = set(np.linspace(0, frames - 1, min(THUMBNAILS, frames)).round().astype(int).tolist())
        self._seen = 0
        self._first: np.ndarray | None = None
        self._last: np.ndarray | None = None

    def add(self, frames: np.ndarray) -> None:
        """The frames of the next group, uint8 (t, H, W, 3)."""
        self.drift.add(frames)
        self.glimpses += [frame.copy() for i, frame in enumerate(frames, self._seen) if i in self._glimpsed]
        self._seen += len(frames)
        if self._first is None or len(self._first) < MEASURED:
            self._first = _joined(self._first, frames)[:MEASURED]
        self._last = _joined(self._last, frames)[-MEASURED:]
        if self.whole is not None:
            self.whole.append(frames)

    @property
    def head_and_tail(self) -> np.ndarray:
        """The first frames and the last ones, as many as `scene_accuracy` looks at, one after the other; some of a
        short video are among both. A video that is shorter than what is looked at, whole."""
        assert self._first is not None and self._last is not None
        return np.concatenate([self._first, self._last]) if self._seen > MEASURED else self._first


def drift_of(videos: Sequence[VideoStats]) -> dict[str, float | None]:
    """Medians over the videos of what `Drift.report` says: the jump at joins, and what changed from the first second to
    the last; None where no video tells."""
    reports = [video.drift.report() for video in videos]
    values: dict[str, list[Any]] = {"jump": [report["jump"] for report in reports]}
    for name in ("colour", "contrast", "sharpness"):
        values[name] = [report["first_to_last"][name] for report in reports]
    known = {name: [value for value in ones if value is not None] for name, ones in values.items()}
    return {name: float(np.median(ones)) if ones else None for name, ones in known.items()}


def _joined(before: np.ndarray | None, frames: np.ndarray) -> np.ndarray:
    return frames if before is None else np.concatenate([before, frames])
