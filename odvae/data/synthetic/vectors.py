"""Arrays of three-dimensional vectors, stored by component: three small arrays stay in the processor's cache, and a
component that is constant stays a number."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Vector(NamedTuple):
    """Vectors of shape (..., 3) as their components; x is right, y up, z away from the camera."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Vector:
        return cls(*np.moveaxis(np.asarray(values, np.float32), -1, 0))

    def plus(self, other: Vector, times: np.ndarray | float = 1) -> Vector:
        """self + times * other"""
        return Vector(self.x + times * other.x, self.y + times * other.y, self.z + times * other.z)

    def dot(self, other: Vector) -> np.ndarray:
        return self.x * other.x + self.y * other.y + self.z * other.z

    def length(self) -> np.ndarray:
        return np.sqrt(self.dot(self))

    def unit(self) -> Vector:
        scale = 1 / np.maximum(self.length(), 1e-9)
        return Vector(self.x * scale, self.y * scale, self.z * scale)

    def rotated(self, matrix: np.ndarray) -> Vector:
        """matrix @ self, for a matrix (3, 3)."""
        return Vector(*(row[0] * self.x + row[1] * self.y + row[2] * self.z for row in matrix))

    def at(self, index: Any) -> Vector:
        """self[index], component by component."""
        return Vector(self.x[index], self.y[index], self.z[index])

    def stack(self) -> np.ndarray:
        return np.stack(np.broadcast_arrays(*self), -1)
