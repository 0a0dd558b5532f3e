"""Signed distances to solids, in their own coordinates: centred, y up, the first argument x, in units of their radius.

Each is at most the true distance (negative inside), so that a ray may be marched by it: J. C. Hart, "Sphere tracing",
The Visual Computer, 1996. Edges are rounded, so that they catch the light.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .vectors import Vector

ROUND = .09  # radius of edges
CONE = (.86, .92)  # radius of the base, half the height


class Shape(NamedTuple):
    distance: Callable[[Vector], np.ndarray]  # at points, to the surface
    height: float  # of the centre over the ground that it stands on
    reach: float  # no point of it is farther from the centre


def _sphere(p: Vector) -> np.ndarray:
    return p.length() - 1


def _cube(p: Vector) -> np.ndarray:
    x, y, z = (np.abs(value) - (.76 - ROUND) for value in p)
    outside = np.sqrt(np.maximum(x, 0)**2 + np.maximum(y, 0)**2 + np.maximum(z, 0)**2)
    return outside + np.minimum(np.maximum(np.maximum(x, y), z), 0) - ROUND


def _cylinder(p: Vector) -> np.ndarray:
    across, along = np.hypot(p.x, p.z) - (.62 - ROUND), np.abs(p.y) - (.92 - ROUND)
    outside = np.hypot(np.maximum(across, 0), np.maximum(along, 0))
    return outside + np.minimum(np.maximum(across, along), 0) - ROUND


def _cone(p: Vector) -> np.ndarray:
    base, half = CONE
    slope = np.hypot(base, 2 * half)
    side = (np.hypot(p.x, p.z) * (2 * half) + (p.y - half) * base) / slope
    floor = -half - p.y
    blend = np.maximum(ROUND - np.abs(side - floor), 0)  # a smooth maximum rounds the rim
    return np.maximum(side, floor) + blend**2 / (4 * ROUND)


def _ring(p: Vector) -> np.ndarray:
    return np.hypot(np.hypot(p.x, p.y) - .70, p.z) - .28


SHAPES: dict[str, Shape] = {
    "sphere": Shape(_sphere, 1, 1), "cube": Shape(_cube, .76, 1.25), "cylinder": Shape(_cylinder, .92, 1.08),
    "cone": Shape(_cone, .92, 1.2), "ring": Shape(_ring, .98, .98)}
