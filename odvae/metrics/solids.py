"""Measure what a scene of the world of solids shows, from its pixels: colours, the subject's motion, the camera's.

The solids are the only saturated things, so they are found by hue; the camera's motion is that of the ground against it
(`ground_motion`), and the subject's is that of its pixels, over the ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.synthetic.flat import COLOURS
from ..data.synthetic.motion import FOCAL
from ..data.synthetic.raycast import HEIGHT, PITCH
from ..data.synthetic.solids import DISTANCE
from .filters import blurred
from .ground_motion import GroundMotion, ground_motion, moved
from .scene import chroma, hue_masks

SATURATION = 48  # of 255, chroma above which a pixel counts as coloured; ground and sky stay below 42
MIN_AREA = .010  # share of the picture that a colour must cover, in one frame of four, to be shown
TURNING, MOVING = .022, .055  # of the camera: radians and units a frame
BOUNCE = .09  # deviation of the vertical steps, in sizes of the solid
PATH = .35  # units over the ground, deviation of the places of a solid that goes somewhere
ROUND = .35  # of its path: least ratio of its width to its length
CHANGE = .16  # difference of a solid's picture three frames later, relative to its contrast, if it turns


@dataclass(frozen=True)
class SolidMeasurement:
    colours: tuple[str, ...]  # that are shown, by area
    motion: str | None  # one of `synthetic.solids.MOTIONS`; None if the subject cannot be tracked
    camera: str  # one of `synthetic.solids.CAMERAS`
    ground: GroundMotion


@dataclass(frozen=True)
class _Track:
    """A solid's pixels, in the N frames that show it."""

    number: np.ndarray  # (N,) of the frame
    box: np.ndarray  # (N, 4) left, right, top, bottom, 0 to 1; nan where the picture's edge cuts it
    middle: np.ndarray  # (N,) centroid, across, 0 to 1
    size: np.ndarray  # (N,) square root of the area, in sides; nan where the picture's edge cuts the solid

    def steps(self, values: np.ndarray) -> np.ndarray:
        """The differences, without nan, of values (N,) between frames that follow each other."""
        steps = np.diff(values)[np.diff(self.number) == 1]
        return steps[np.isfinite(steps)]

    def across(self) -> np.ndarray:
        """Steps to the right, of the edges that show."""
        return np.concatenate([self.steps(self.box[:, 0]), self.steps(self.box[:, 1])])

    def down(self) -> np.ndarray:
        """Steps downwards, of the top: a polished ground mirrors the bottom."""
        return self.steps(self.box[:, 2])

    def growth(self) -> np.ndarray:
        """Steps of the logarithm of the size, or of the width where the size cannot be seen."""
        steps = self.steps(np.log(self.size))
        return steps if len(steps) > 2 else self.steps(np.log(np.maximum(self.box[:, 1] - self.box[:, 0], .01)))


def measure_solids(frames: np.ndarray, colour: str | None = None) -> SolidMeasurement:
    """Measure uint8 (T, H, W, 3). The subject is the solid of hue `colour`, else of the hue with the largest area."""
    frames = blurred(frames, 1)
    masks = hue_masks(frames, chroma(frames) > SATURATION)
    areas = np.quantile(masks.mean((2, 3)), .75, axis=1)
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= MIN_AREA]
    names, ground = list(COLOURS), ground_motion(frames)
    colours = tuple(names[i] for i in order)
    number = names.index(colour) if colour else order[0] if order else None
    track = None if number is None else _follow(masks[number])
    if track is None or number is None:
        return SolidMeasurement(colours, None, _camera(ground, 0.0), ground)
    growth = float(np.mean(track.growth())) if len(track.growth()) else 0.0
    camera = _camera(ground, growth)
    if camera == "follows":
        return SolidMeasurement(colours, _direction(-np.array([ground.across, ground.ahead])), camera, ground)
    return SolidMeasurement(colours, _motion(frames, masks[number], track, camera, ground, growth), camera, ground)


def _camera(ground: GroundMotion, growth: float) -> str:
    """Classify the camera's motion; `growth` is that of the subject, of the logarithm of its size per frame."""
    if abs(ground.turn) > TURNING:
        if abs(ground.across) < .5 * DISTANCE * abs(ground.turn):
            return "orbits"
        return "pans right" if ground.turn > 0 else "pans left"
    if np.hypot(ground.across, ground.ahead) < MOVING:
        return "still"
    if abs(ground.ahead) > abs(ground.across) and -growth * np.sign(ground.ahead) > .006:
        return "approaches" if growth > 0 else "retreats"
    return "follows"


def _direction(step: np.ndarray) -> str:
    """The motion of a step (across, ahead) over the ground."""
    if abs(step[0]) > abs(step[1]):
        return "right" if step[0] > 0 else "left"
    return "away" if step[1] > 0 else "towards"


def _motion(frames: np.ndarray, mask: np.ndarray, track: _Track, camera: str, ground: GroundMotion,
            growth: float) -> str | None:
    """Classify the subject's motion, for a camera that does not follow it."""
    across, down, whole = track.across(), track.down(), np.isfinite(track.size)
    size = np.median(track.size[whole]) if whole.any() else .25
    path = _path(track, ground)[whole] if camera in ("still", "orbits") else np.zeros((0, 2))
    spread = np.linalg.svd(path - path.mean(0), compute_uv=False) / np.sqrt(len(path)) if len(path) > 3 else (0, 0)
    bouncing = len(down) > 2 and np.std(down) / size > BOUNCE
    curved = whole.mean() > .7 and spread[0] > PATH and spread[1] > ROUND * spread[0]
    if curved and (camera == "still" or not bouncing):  # before an orbiting camera a bounce looks curved
        return "circles"
    if camera == "still" and len(across):
        step = np.median(across)
        if abs(step) > .018 and np.mean(across * np.sign(step) > .008) > .85:
            return "right" if step > 0 else "left"
    if bouncing:
        return "bounces"
    if camera == "still" and np.isnan(track.box[:, 3]).mean() > .4 and abs(np.median(down)) > .006:
        return "towards" if np.median(down) > 0 else "away"  # below the picture's edge
    if camera == "still" and abs(growth) > .009 and np.mean(np.sign(growth) * track.growth() > -.002) > .8:
        return "towards" if growth > 0 else "away"
    if spread[0] > PATH:
        return "sways"
    return "turns" if camera == "still" and _change(frames, mask, track) > CHANGE else "rests"


def _follow(mask: np.ndarray) -> _Track | None:
    """Track a mask (T, H, W); None if it shows in fewer than three frames."""
    number = np.flatnonzero(mask.mean((1, 2)) >= MIN_AREA / 3)
    if len(number) < 3:
        return None
    mask = mask[number]
    rows, columns = mask.sum(2), mask.sum(1)
    middle = columns @ (np.arange(mask.shape[2]) + .5) / mask.shape[2] / columns.sum(1)
    box = np.stack([edge for profile in (columns, rows) for edge in _edges(profile)], -1)
    size = np.where(np.isnan(box).any(1), np.nan, np.sqrt(mask.mean((1, 2))))
    return _Track(number, box, middle, size)


def _edges(profile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last place, 0 to 1, where a profile (N, n) has a seventh of its maximum; nan where that is the
    picture's edge."""
    some, n = profile >= np.maximum(2, .15 * profile.max(1, keepdims=True)), profile.shape[1]
    first, last = np.argmax(some, axis=1), n - np.argmax(some[:, ::-1], axis=1)
    return np.where((first > 0) & some.any(1), first / n, np.nan), np.where((last < n) & some.any(1), last / n, np.nan)


def _path(track: _Track, ground: GroundMotion) -> np.ndarray:
    """The places (N, 2) of a solid on the ground as it was in the first frame."""
    slope = (1 - 2 * track.box[:, 3]) / FOCAL
    ahead = np.clip(HEIGHT / np.maximum(np.tan(PITCH - np.arctan(slope)), .1), 1, 14) + .4
    place = np.stack([(2 * track.middle - 1) / FOCAL * ahead, ahead], -1)
    back = GroundMotion(0, 0, -ground.turn)
    for i, number in enumerate(track.number):
        for _ in range(number):
            place[i] = moved(place[i] - [ground.across, ground.ahead], back)
    return place


def _change(frames: np.ndarray, mask: np.ndarray, track: _Track) -> float:
    """How much a solid's picture, cut out and scaled, differs three frames later, relative to its contrast (median)."""
    grey, patches = frames.astype(np.float32).mean(-1), {}
    for number in track.number:
        rows, columns = (np.flatnonzero(mask[number].any(axis)) for axis in (1, 0))
        y, x = (np.linspace(ends[0], ends[-1], 16).round().astype(int) for ends in (rows, columns))
        patches[number] = np.where(mask[number], grey[number], 0)[np.ix_(y, x)]
    pairs = [(patches[n], patches[n + 3]) for n in patches if n + 3 in patches]
    if not pairs:
        return 0.0
    return float(np.median([np.sqrt(np.mean((a - b)**2)) / (np.std(a) + 5) for a, b in pairs]))


def ground_contrast(frames: np.ndarray) -> float:
    """The root mean square, in grey levels, of what differs from its row's mean on the ground: uint8 (T, H, W, 3)."""
    grey, ground = frames.astype(np.float32).mean(-1), chroma(frames) <= SATURATION
    ground[:, :frames.shape[1] // 2] = False  # the sky and the distance
    count = np.maximum(ground.sum(2, keepdims=True), 1)
    grey = np.where(ground, grey - (grey * ground).sum(2, keepdims=True) / count, 0)
    return float(np.sqrt((grey**2).sum() / max(int(ground.sum()), 1)))
