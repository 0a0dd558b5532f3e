"""Where the solids of a scene are at each time, as its camera sees them. A function of time alone, for ever.

The camera's frame: the origin on the ground below the camera, x right, y up, z ahead. What a still scene would be is
turned and shifted into it; a solid that moves through the picture is wrapped around where it cannot be seen, beside the
picture, behind the camera or in the mist.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .shapes import SHAPES
from .solids import DISTANCE, Solid, SolidScene

FOCAL = 1.9  # of the camera, in halves of the picture's side
NEAR, FAR = .95, 11.0  # where solids on their way through the picture enter and leave it, units ahead of the camera
MARGIN = .35  # between the edge of the picture and a solid that is wrapped around

_HEADINGS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "towards": (0.0, -1.0), "away": (0.0, 1.0)}


class Poses(NamedTuple):
    """A scene in its camera's frame, at T times."""

    turn: np.ndarray  # (T,) radians, of the camera to the right since the start
    ground: np.ndarray  # (T, 2) the place (x, z) of the ground below the camera, as if it had not turned
    positions: np.ndarray  # (T, S, 3) of the solids' centres
    rotations: np.ndarray  # (T, S, 3, 3) from the solids' coordinates to the camera's


def poses(scene: SolidScene, seconds: np.ndarray) -> Poses:
    """Compute where everything is at times (T,)."""
    rates, heading = scene.rates, np.array(_HEADINGS.get(scene.motion, (0.0, 0.0)))
    shift, turn, pivot = np.zeros((len(seconds), 2)), np.zeros(len(seconds)), 0.0
    if scene.camera == "follows":
        shift = seconds[:, None] * rates.speed * heading
    elif scene.camera in ("approaches", "retreats"):
        shift[:, 1] = seconds * rates.camera_speed * (1 if scene.camera == "approaches" else -1)
    elif scene.camera == "orbits":
        turn, pivot = rates.camera_turn * seconds, DISTANCE
    elif scene.camera.startswith("pans"):
        turn = abs(rates.camera_turn) * .7 * seconds * (1 if scene.camera == "pans right" else -1)
    positions, rotations = [], []
    for number, solid in enumerate(scene.solids):
        own = scene.motion if number == 0 else "rests"
        place, rotation = _move(scene, solid, own, seconds)
        place[:, 2] += DISTANCE
        place[:, [0, 2]] -= shift
        moving = (heading if number == 0 and own in _HEADINGS else 0) - _camera_heading(scene)
        _wrap(place, moving, solid.radius)
        place = _turned(place, turn, pivot)
        if scene.camera.startswith("pans"):
            place = _wrap_around(place, solid.radius)
        positions.append(place)
        rotations.append(_about_y(-turn) @ rotation)
    below = np.array([0, pivot]) - np.stack([pivot * np.sin(turn), pivot * np.cos(turn)], -1)
    return Poses(turn, shift + below, np.stack(positions, 1).astype(np.float32),
                 np.stack(rotations, 1).astype(np.float32))


def _camera_heading(scene: SolidScene) -> np.ndarray:
    """The direction (x, z) in which the camera travels, or zero."""
    if scene.camera == "follows":
        return np.array(_HEADINGS[scene.motion])
    return np.array([0.0, {"approaches": 1.0, "retreats": -1.0}.get(scene.camera, 0.0)])


def _move(scene: SolidScene, solid: Solid, motion: str, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre (T, 3), from the scene's middle, and the rotation (T, 3, 3) of a solid, before a
    still camera."""
    rates, height = scene.rates, SHAPES[solid.shape].height * solid.radius
    place = np.tile([solid.position[0], height, solid.position[1]], (len(seconds), 1))
    cycle = seconds / rates.period + rates.phase
    rolling, spin = solid.shape == "sphere", np.full(len(seconds), solid.heading)
    upright = _about_y(spin)
    if motion in _HEADINGS:
        way, (dx, dz) = rates.speed * seconds, _HEADINGS[motion]
        place[:, 0] += dx * way
        place[:, 2] += dz * way
        if rolling:
            roll = _about_z(-dx * way / solid.radius) if dx else _about_x(dz * way / solid.radius)
            return place, roll @ upright
    elif motion == "bounces":
        part = cycle % 1
        place[:, 1] += 4 * rates.extent * part * (1 - part)
    elif motion == "turns":
        upright = _about_y(spin + 2 * math.pi * cycle)
    elif motion == "circles":
        angle = 2 * math.pi * cycle
        place[:, 0] += rates.extent * np.cos(angle)
        place[:, 2] += rates.extent * np.sin(angle)
        upright = _about_y(spin - angle)
    elif motion == "sways":
        way = rates.extent * np.sin(2 * math.pi * cycle)
        place[:, 0] += way
        if rolling:
            return place, _about_z(-way / solid.radius) @ upright
    return place, upright


def _wrap(place: np.ndarray, moving: np.ndarray, radius: float) -> None:
    """Wrap places (T, 3) of a solid that goes through the picture in direction (x, z), in place."""
    if moving[0]:
        half = place[:, 2] / FOCAL + radius + MARGIN
        place[:, 0] = (place[:, 0] + half) % (2 * half) - half
    elif moving[1]:
        place[:, 2] = (place[:, 2] - NEAR) % (FAR - NEAR) + NEAR


def _wrap_around(place: np.ndarray, radius: float) -> np.ndarray:
    """Wrap places (T, 3) around the camera, from one edge of the picture to the other."""
    distance, angle = np.hypot(place[:, 0], place[:, 2]), np.arctan2(place[:, 0], place[:, 2])
    half = math.atan(1 / FOCAL) + (radius + MARGIN) / distance
    angle = (angle + half) % (2 * half) - half
    return np.stack([distance * np.sin(angle), place[:, 1], distance * np.cos(angle)], -1)


def _turned(place: np.ndarray, turn: np.ndarray, pivot: float) -> np.ndarray:
    """Turn places (T, 3) against the camera's turn, about (0, pivot)."""
    x, z, cosine, sine = place[:, 0], place[:, 2] - pivot, np.cos(turn), np.sin(turn)
    return np.stack([x * cosine - z * sine, place[:, 1], x * sine + z * cosine + pivot], -1)


def _about_y(angle: np.ndarray) -> np.ndarray:
    """Rotations (T, 3, 3) that turn z towards x."""
    c, s, o, i = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, o, s, o, i, o, -s, o, c], -1).reshape(-1, 3, 3)


def _about_x(angle: np.ndarray) -> np.ndarray:
    """Rotations (T, 3, 3) that turn y towards z."""
    c, s, o, i = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([i, o, o, o, c, -s, o, s, c], -1).reshape(-1, 3, 3)


def _about_z(angle: np.ndarray) -> np.ndarray:
    """Rotations (T, 3, 3) that turn x towards y."""
    c, s, o, i = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    return np.stack([c, -s, o, s, c, o, o, o, i], -1).reshape(-1, 3, 3)
