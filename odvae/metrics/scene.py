"""Measure what a rendered (or generated) scene shows from its pixels: the shape's colour and direction.

The shape is the only saturated thing in a scene, and the scene is a torus, so the shape is found by hue and tracked by
the circular centroid of that hue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..data.synthetic import COLOURS, DIRECTIONS

SATURATION = 90  # of 255, chroma above which a pixel counts as coloured; backgrounds stay below 25
MIN_AREA = .01  # share of the picture that must be coloured for a frame to count


@dataclass(frozen=True)
class SceneMeasurement:
    colour: str | None  # the hue with the largest area; None if nothing is coloured
    direction: str | None  # None if the shape cannot be tracked
    speed: float  # sides per frame, along the measured displacement


def measure_scene(frames: np.ndarray, colour: str | None = None) -> SceneMeasurement:
    """Measure uint8 (T, H, W, 3). The direction is that of the pixels of hue `colour` if given, else of the hue with
    the largest area."""
    classes = list(COLOURS)
    masks = hue_masks(frames, chroma(frames) > SATURATION)  # (6, T, H, W)
    areas = masks.mean(axis=(1, 2, 3))
    hue = classes[int(areas.argmax())] if areas.max() >= MIN_AREA else None
    tracked = colour or hue
    if tracked is None:
        return SceneMeasurement(None, None, 0.0)
    dx, dy = _displacement(masks[classes.index(tracked)])
    speed = math.hypot(dx, dy)
    if not speed > .004:  # a quarter of a pixel a frame at 64
        return SceneMeasurement(hue, None, 0.0)
    direction = max(DIRECTIONS, key=lambda name: dx * DIRECTIONS[name][0] + dy * DIRECTIONS[name][1])
    return SceneMeasurement(hue, direction, speed)


def chroma(frames: np.ndarray) -> np.ndarray:
    """Return the difference between the largest and the smallest channel, 0 to 255: uint8 (..., 3) -> (...)."""
    return frames.max(-1) - frames.min(-1)


def hue_masks(frames: np.ndarray, coloured: np.ndarray) -> np.ndarray:
    """Classify coloured pixels by the nearest of the six hues, in the order of COLOURS: uint8 (T, H, W, 3) and boolean
    (T, H, W) -> boolean (6, T, H, W)."""
    rgb = frames.astype(np.float32)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    nearest = np.round(hue / 60).astype(int) % 6  # COLOURS are in the order of their hues
    return np.stack([(nearest == i) & coloured for i in range(6)])


def _displacement(mask: np.ndarray) -> tuple[float, float]:
    """Return the median displacement per frame (x, y) of a mask (T, H, W) on the torus, in sides; nan if it is visible
    in too few frames."""
    visible = mask.mean(axis=(1, 2)) >= MIN_AREA
    steps = visible[1:] & visible[:-1]
    if steps.sum() < max(2, len(mask) // 2):
        return math.nan, math.nan
    moves = []
    for profile in (mask.sum(axis=1), mask.sum(axis=2)):  # along x, along y
        n = profile.shape[1]
        phase = np.angle((profile * np.exp(2j * math.pi * np.arange(n) / n)).sum(axis=1))
        step = np.angle(np.exp(1j * np.diff(phase))) / (2 * math.pi)
        moves.append(float(np.median(step[steps])))
    return moves[0], moves[1]
