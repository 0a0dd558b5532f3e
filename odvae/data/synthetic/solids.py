"""The world of solids: what a scene consists of, and how it is drawn at random.

One to three coloured solids on a patterned ground under a sky. The first one is the scene's subject: it moves, and
the camera may move too. Colours are saturated, ground and sky are not. Every motion goes on for ever: what leaves the
picture comes back on the other side or out of the mist, so that a scene can be rendered at any length (`motion`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .lights import LIGHTS
from .shapes import SHAPES

TONES: dict[str, tuple[int, int, int]] = {  # of the six colours: their hues are near those of the flat world
    "red": (222, 38, 42), "yellow": (240, 212, 24), "green": (44, 176, 66),
    "cyan": (30, 190, 200), "blue": (40, 66, 226), "magenta": (214, 44, 196)}
MATERIALS = ("matte", "glossy", "metallic")
GROUNDS = ("checkered", "striped", "rippled", "mottled")
MOTIONS = ("left", "right", "towards", "away", "bounces", "turns", "circles", "sways", "rests")
CAMERAS = ("still", "follows", "orbits", "pans left", "pans right", "approaches", "retreats")
CAMERAS_BY_MOTION = {  # those under which the picture shows which motion it is, with their weights
    **{motion: {"still": 6, "follows": 4} for motion in ("left", "right", "towards", "away")},
    **{motion: {"still": 4, "orbits": 3, "pans left": 1, "pans right": 1, "approaches": 1, "retreats": 1}
       for motion in ("bounces", "rests")},
    "turns": {"still": 1},
    **{motion: {"still": 7, "orbits": 3} for motion in ("circles", "sways")}}
_MOTION_WEIGHTS = (4, 4, 3, 3, 5, 4, 4, 4, 2)
DISTANCE = 4.3  # from the camera to the middle of a scene, on the ground; the unit is about the height of a solid


@dataclass(frozen=True)
class Solid:
    shape: str
    colour: str
    material: str
    striped: bool  # with meridians in a lighter tone, so that its turning shows
    radius: float
    position: tuple[float, float]  # (x, z) on the ground at the start, from the scene's middle
    heading: float  # radians, about the vertical


class Rates(NamedTuple):
    """How fast and how far things move; a scene uses those of its motion and its camera."""

    speed: float  # of the subject over the ground, units a second
    period: float  # of bouncing, turning, circling and swaying, seconds
    extent: float  # height of a bounce, radius of a circle, amplitude of swaying
    phase: float  # of the period at the start, 0 to 1
    camera_speed: float  # units a second
    camera_turn: float  # of orbiting, radians a second, either sign


@dataclass(frozen=True)
class SolidScene:
    """The content of a clip. Lengths are in units of the world, so that a scene renders at any size."""

    solids: tuple[Solid, ...]
    motion: str
    camera: str
    ground: str
    light: str
    rates: Rates
    sun: float  # direction of the light at the start, radians from straight ahead to the right
    polish: float  # of the ground, 0 to 1: how much it mirrors the solids
    place: tuple[float, float]  # of the ground's pattern
    grain: float  # direction of the ground's pattern, radians
    hills: tuple[float, float, float]  # phases of the skyline
    seed: int

    @property
    def subject(self) -> Solid:
        return self.solids[0]


def sample_solid_scene(seed: int) -> SolidScene:
    """Sample a scene, as a pure function of `seed`."""
    rng = np.random.default_rng(np.random.SeedSequence([0x501D, seed]))
    motion = _choose(rng, dict(zip(MOTIONS, _MOTION_WEIGHTS, strict=True)))
    camera = _choose(rng, CAMERAS_BY_MOTION[motion])
    return make_scene(rng, motion, camera, colour=str(rng.choice(list(TONES))),
                      shape=str(rng.choice(list(SHAPES))), seed=seed)


def make_scene(rng: np.random.Generator, motion: str, camera: str, colour: str, shape: str, seed: int) -> SolidScene:
    """Draw the rest of a scene whose subject and motions are given."""
    places = _places(rng, motion, camera, count=int(_choose(rng, {"1": 5, "2": 4, "3": 1})))
    colours = [colour, *rng.permutation([name for name in TONES if name != colour])]
    shapes = [shape, *rng.choice(list(SHAPES), 2)]
    solids = [_sample_solid(rng, str(shapes[i]), str(colours[i]), "rests" if i else motion, place)
              for i, place in enumerate(places)]
    sun = rng.uniform(.9, 2.2) * rng.choice([-1, 1])
    return SolidScene(
        solids=tuple(solids), motion=motion, camera=camera, ground=_choose(rng, dict.fromkeys(GROUNDS, 1)),
        light=_choose(rng, dict.fromkeys(LIGHTS, 1)), rates=_sample_rates(rng, motion), sun=float(sun),
        polish=float(rng.choice([0, 0, .55])), place=(float(rng.uniform(0, 8)), float(rng.uniform(0, 8))),
        grain=float(rng.choice([0, 1, -1, 2]) * math.pi / 4),
        hills=(float(rng.uniform(0, 6.3)), float(rng.uniform(0, 6.3)), float(rng.uniform(0, 6.3))), seed=seed)


def _sample_solid(rng: np.random.Generator, shape: str, colour: str, motion: str, place: tuple[float, float]) -> Solid:
    size = rng.uniform(.68, .82) if motion != "rests" else rng.uniform(.58, .72)
    smooth = shape in ("sphere", "cylinder", "cone")
    striped = smooth and (motion == "turns" or rng.random() < (.75 if shape == "sphere" else .2))
    return Solid(shape, colour, str(rng.choice(MATERIALS)), bool(striped), float(size), place,
                 float(rng.uniform(-.9, .9)))


def _places(rng: np.random.Generator, motion: str, camera: str, count: int) -> list[tuple[float, float]]:
    """The solids' places: the others are out of the subject's way, and of each other's."""
    side, u = float(rng.choice([-1, 1])), rng.uniform(0, 1, 6)
    along = (u[0] - .5) * (.8 if camera == "follows" else 4.4)  # a followed solid is near the middle of the picture
    if motion in ("left", "right"):
        places = [(along, .5 * u[1] - .6), (side * (.5 + u[2]), 1.5 + .5 * u[3]),
                  (-side * (.6 + u[4]), 1.5 + .5 * u[5])]
    elif motion in ("circles", "sways"):
        places = [(0, .3 * u[1] - .3), (side * (.5 + u[2]), 2.2 + .4 * u[3]), (-side * (.6 + u[4]), 2.2 + .4 * u[5])]
    elif motion in ("towards", "away"):
        places = [(side * .3 * (u[1] + .5), along), (-side * (1.2 + .3 * u[2]), u[3]),
                  (side * (2.0 + .3 * u[4]), u[5])]
    else:
        places = [(u[0] - .5 if count == 1 else side * (.6 + .3 * u[0]), .7 * u[1] - .4),
                  (-side * (.75 + .3 * u[2]), .6 * u[3]), (side * (.3 * u[4] - .1), 1.7 + .3 * u[5])]
    return [(float(x), float(z)) for x, z in places[:count]]


def _sample_rates(rng: np.random.Generator, motion: str) -> Rates:
    ranges = {"bounces": ((1.0, 1.4), (.7, 1.1)), "turns": ((3.2, 4.8), (0, 0)), "circles": ((2.6, 3.6), (.8, 1.0)),
              "sways": ((2.2, 3.0), (.9, 1.3))}
    period, extent = ranges.get(motion, ((1, 1), (0, 0)))
    return Rates(speed=float(rng.uniform(1.1, 1.5)), period=float(rng.uniform(*period)),
                 extent=float(rng.uniform(*extent)), phase=float(rng.random()),
                 camera_speed=float(rng.uniform(.75, 1.0)),
                 camera_turn=float(rng.uniform(.40, .60) * rng.choice([-1, 1])))


def _choose(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """Draw a key with a probability in proportion to its value."""
    total = sum(weights.values())
    return str(rng.choice(list(weights), p=[weight / total for weight in weights.values()]))
