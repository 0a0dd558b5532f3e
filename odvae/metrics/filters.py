"""Small filters over the pixels of clips."""

from __future__ import annotations

import numpy as np


def blurred(frames: np.ndarray, passes: int = 2) -> np.ndarray:
    """Blur (T, H, W, ...) over height and width by a binomial of 1 + 2 * `passes` pixels; float32."""
    frames = frames.astype(np.float32)
    for axis in (1, 2):
        for _ in range(passes):
            padded, n = _padded(frames, axis, 1), frames.shape[axis]
            frames = .5 * frames + .25 * (_part(padded, axis, 0, n) + _part(padded, axis, 2, n))
    return frames


def dilated(mask: np.ndarray, pixels: int = 2) -> np.ndarray:
    """Dilate (T, H, W) bool by a square."""
    for axis in (1, 2):
        padded, n = _padded(mask, axis, pixels), mask.shape[axis]
        mask = np.logical_or.reduce([_part(padded, axis, k, n) for k in range(2 * pixels + 1)])
    return mask


def _padded(values: np.ndarray, axis: int, pixels: int) -> np.ndarray:
    return np.pad(values, [(pixels, pixels) if i == axis else (0, 0) for i in range(values.ndim)], mode="edge")


def _part(values: np.ndarray, axis: int, begin: int, count: int) -> np.ndarray:
    return values[(slice(None),) * axis + (slice(begin, begin + count),)]
