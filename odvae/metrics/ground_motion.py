"""How the ground of a scene of the world of solids moves before its camera, from the frames alone.

The camera's height and pitch are those of every such scene, so each pixel of the ground has a place on it, and seen
from above the ground moves rigidly. One shift and one turn a frame, the same over the whole clip, are fitted to all its
frames: direct alignment by Gauss-Newton steps (Lucas and Kanade, 1981) with weights that ignore what does not fit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data.synthetic.ground import mist
from ..data.synthetic.motion import FOCAL
from ..data.synthetic.raycast import HEIGHT, PITCH, project
from ..data.synthetic.solids import DISTANCE
from .filters import blurred, dilated
from .scene import chroma

COLOURED = 44  # of 255, chroma above which a pixel belongs to a solid
SHADOW = .85  # of the ground's brightness, below which it is in the shade of a solid
SOFT_EDGE = .05  # of shadows, in sides of the picture
ITERATIONS = 9
_X, _Z = np.meshgrid(np.linspace(-2.6, 2.6, 44), np.linspace(2.1, 6.1, 36))  # places on the ground, units
_SPACING = (_Z[1, 0] - _Z[0, 0], _X[0, 1] - _X[0, 0])


class GroundMotion(NamedTuple):
    """Of the ground against the camera, per frame."""

    across: float  # units to the right, in the scene's middle
    ahead: float  # units away from the camera, there
    turn: float  # radians, to the left about the scene's middle: what a camera sees that turns to the right


def ground_motion(frames: np.ndarray) -> GroundMotion:
    """Measure uint8 (T, H, W, 3), at least two frames."""
    frames = blurred(frames)
    grey = _cleared(frames.mean(-1))
    moving = dilated((chroma(frames) > COLOURED) | _shaded(grey), pixels=max(2, round(SOFT_EDGE * grey.shape[1])))
    grey = np.where(moving, np.nan, grey)
    here, motion = np.stack([_sample(image, _X, _Z) for image in grey[:-1]]), np.zeros(3)
    for step in range(ITERATIONS):
        x, z = _moved(motion)
        there = np.stack([_sample(image, x, z) for image in grey[1:]])
        slope_z, slope_x = np.gradient(there, *_SPACING, axis=(1, 2))
        usable = np.isfinite(here + there + slope_x + slope_z)
        here0, there, slope_x, slope_z = (np.where(usable, value, 0) for value in (here, there, slope_x, slope_z))
        error = there - here0
        count = np.maximum(usable.sum((1, 2), keepdims=True), 1)
        error = np.where(usable, error - error.sum((1, 2), keepdims=True) / count, 0)  # a change of the light
        # Columns: the change of `there` with the shift across, the shift ahead, and the turn.
        columns = np.stack([slope_x, slope_z, (z - DISTANCE) * -slope_x + x * slope_z], -1)
        scale = 2 * np.median(np.abs(error[usable])) + .5 if usable.any() else 1.0
        weight = usable / (1 + (error / scale)**2) if step > 3 else usable
        weighted = (columns * weight[..., None]).reshape(-1, 3)
        normal = weighted.T @ columns.reshape(-1, 3) + 1e-3 * np.eye(3)
        motion = motion - np.linalg.solve(normal, weighted.T @ error.reshape(-1))
    return GroundMotion(float(motion[0]), float(motion[1]), float(motion[2]))


def _shaded(grey: np.ndarray) -> np.ndarray:
    """Where (T, H, W) is much darker than the ground is in most of its row: shadows, which move with the solids."""
    return grey < SHADOW * np.median(grey, axis=(0, 2), keepdims=True)


def _cleared(grey: np.ndarray) -> np.ndarray:
    """Take the mist, which does not move with the ground, from (T, H, W)."""
    size = grey.shape[1]
    slope = (1 - 2 * (np.arange(size) + .5) / size) / FOCAL
    down = np.tan(PITCH - np.arctan(slope))
    share = mist(HEIGHT / np.maximum(down, 1e-3))[None, :, None]
    horizon = grey[:, int(np.argmin(np.abs(down)))].mean(-1)[:, None, None]
    return (grey - share * horizon) / np.maximum(1 - share, .2)


def moved(place: np.ndarray, motion: GroundMotion) -> np.ndarray:
    """Where the ground's places (..., 2) are a frame later."""
    x, z = place[..., 0], place[..., 1] - DISTANCE
    cosine, sine = np.cos(motion.turn), np.sin(motion.turn)
    return np.stack([x * cosine - z * sine + motion.across, x * sine + z * cosine + DISTANCE + motion.ahead], -1)


def _moved(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, z = np.moveaxis(moved(np.stack([_X, _Z], -1), GroundMotion(*motion)), -1, 0)
    return x, z


def _sample(image: np.ndarray, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Interpolate (H, W) at places on the ground; nan outside the picture."""
    size = np.array(image.shape)[::-1]
    across, down = np.moveaxis(project(np.stack([x, np.zeros_like(x), z], -1)) * size - .5, -1, 0)
    inside = (across >= 0) & (across <= size[0] - 1) & (down >= 0) & (down <= size[1] - 1) & (z > 1)
    left = np.clip(np.floor(across).astype(int), 0, size[0] - 2)
    top = np.clip(np.floor(down).astype(int), 0, size[1] - 2)
    a, b = across - left, down - top
    upper = image[top, left] * (1 - a) + image[top, left + 1] * a
    lower = image[top + 1, left] * (1 - a) + image[top + 1, left + 1] * a
    return np.where(inside, upper * (1 - b) + lower * b, np.nan)
