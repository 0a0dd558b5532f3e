"""Ground and sky of the world of solids, and the shade that solids cast on the ground."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .lights import Light, Rgb
from .shapes import SHAPES
from .solids import SolidScene
from .vectors import Vector

TILE = 8.0  # units after which each pattern repeats, so that the ground has no end
CONTRAST = {"checkered": .30, "striped": .26, "rippled": .22, "mottled": .24}  # of the reflectance
MIST = 9.3  # units ahead at which 63 % of the light is the mist's
SOFTNESS = 7.0  # of shadows: penumbras are a seventh as wide as the way of the light from the solid's edge


def mist(distance: np.ndarray) -> np.ndarray:
    """The share of the mist in the light that comes from a distance: none nearby, a wall far off."""
    return 1 - np.exp(-(distance / MIST)**6)


def pattern(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The ground's pattern at places, about -1 to 1; it repeats after `TILE` in both directions, and none is the same
    all along a line, so that every motion over it shows."""
    u, v = 2 * math.pi / TILE * u, 2 * math.pi / TILE * v
    waves = np.sin(2 * u + v) + np.sin(2 * v - u + 1) + .8 * np.sin(3 * u - v + 2) + .8 * np.sin(u + 3 * v + .5)
    if kind == "checkered":
        return np.tanh(3 * np.sin(3 * u) * np.sin(3 * v)) + .15 * waves
    if kind == "striped":
        return np.tanh(2 * np.sin(5 * u)) + .25 * waves
    if kind == "rippled":
        return np.sin(5 * v + 1.1 * np.sin(u) + .7 * np.sin(2 * u + 1)) + .25 * waves
    return .55 * waves


def ground_colour(scene: SolidScene, light: Light, points: Vector, turn: float, below: np.ndarray) -> np.ndarray:
    """The reflectance (..., 3) of the ground at `points` of the camera's frame."""
    angle = scene.grain + turn
    start = np.array(scene.place) + below
    cosine, sine = math.cos(scene.grain), math.sin(scene.grain)
    u0 = float(start[0] * cosine + start[1] * sine) % TILE
    v0 = float(start[1] * cosine - start[0] * sine) % TILE
    cosine, sine = math.cos(angle), math.sin(angle)
    u, v = points.x * cosine + points.z * sine + u0, points.z * cosine - points.x * sine + v0
    fade = np.exp(-(points.z / 9)**2)  # finer than the pixels, far off
    return (1 + CONTRAST[scene.ground] * fade * pattern(scene.ground, u, v))[..., None] * rgb(light.ground)


def sky_colour(light: Light, rays: Vector, sun: Vector) -> np.ndarray:
    """The light (..., 3) that comes from above along unit vectors; below the horizon it is that of the horizon."""
    high = (1 - np.exp(-4.2 * np.maximum(rays.y, 0)))[..., None]
    glow = np.maximum(rays.dot(sun), 0)[..., None]**12
    return rgb(light.horizon) + high * (rgb(light.zenith) - rgb(light.horizon)) + .22 * glow * rgb(light.sun)


def hills(scene: SolidScene, light: Light, rays: Vector, turn: float, pixel: float) -> tuple[np.ndarray, np.ndarray]:
    """The hills' cover (...) and colour (3,) along unit vectors; they are endlessly far away."""
    azimuth, (a, b, c) = np.arctan2(rays.x, rays.z) + turn, scene.hills
    skyline = .035 + .022 * np.sin(3 * azimuth + a) + .014 * np.sin(7 * azimuth + b) + .008 * np.sin(13 * azimuth + c)
    cover = np.clip((skyline - rays.y) / pixel + .5, 0, 1) * (rays.y > -pixel)
    return cover, .62 * rgb(light.horizon) + .28 * rgb(light.zenith)


def sunlight(solids: Sequence[tuple[str, float, np.ndarray, np.ndarray]], points: Vector, sun: Vector) -> np.ndarray:
    """The share of the sun's light (N,) that reaches points: soft shadows by marching towards the sun.

    R. Guy and S. Aaltonen's penumbra estimate, as I. Quilez gives it ("Soft shadows in raymarched SDFs"): the narrowest
    angle between the ray and the solid.

    Args:
        solids: shape, radius, centre (3,) and rotation (3, 3) of each.
    """
    share = np.ones(points.x.shape, np.float32)
    for name, radius, centre, rotation in solids:
        shape = SHAPES[name]
        reach = shape.reach * radius
        offset = Vector(*(value - middle for value, middle in zip(points, centre, strict=True)))
        along = -offset.dot(sun)
        nearest = np.sqrt(np.maximum(offset.dot(offset) - along**2, 0))
        near = (nearest < reach + along / SOFTNESS) & (along > 0)
        if not near.any():
            continue
        start = offset.at(near).rotated(rotation.T / radius)
        ray = Vector.of(np.stack(sun)).rotated(rotation.T)
        t, angle = np.maximum(along[near] / radius - 1.2 * shape.reach, .02), np.ones(int(near.sum()), np.float32)
        for _ in range(14):
            distance = shape.distance(start.plus(ray, t))
            angle = np.minimum(angle, SOFTNESS * distance / t)
            t = t + np.clip(distance, .04, .4)
        lit = np.clip(.5 + .5 * angle, 0, 1)
        share[near] *= lit * lit * (3 - 2 * lit)
    return share


def openness(solids: Sequence[tuple[str, float, np.ndarray, np.ndarray]], points: Vector) -> np.ndarray:
    """The share of the sky (N,) that points of the ground see past the solids, each taken for a ball."""
    share = np.ones(points.x.shape, np.float32)
    for name, radius, centre, _ in solids:
        size = radius * (SHAPES[name].height + .1)
        square = (points.x - centre[0])**2 + (points.z - centre[2])**2 + centre[1]**2
        share *= 1 - .85 * np.minimum(centre[1] * size**2 / (square * np.sqrt(square)), 1)
    return share


def rgb(colour: Rgb) -> np.ndarray:
    return np.asarray(colour, np.float32)
