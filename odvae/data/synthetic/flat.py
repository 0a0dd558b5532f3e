"""The flat world: quick to render, for tests and first runs.

One coloured shape moves in one of eight directions over a textured background that drifts by itself. The scene is a
torus (what leaves on one side enters on the other), so that motion can be measured in clips of any length. Colours are
saturated and backgrounds are not, so that the shape can be found by its hue (`odvae.metrics.scene`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {  # hues 60 degrees apart
    "red": (225, 45, 45), "yellow": (225, 215, 45), "green": (45, 200, 60),
    "cyan": (45, 210, 215), "blue": (55, 70, 230), "magenta": (220, 55, 215),
}
DIRECTIONS: dict[str, tuple[float, float]] = {  # unit vectors (x right, y down)
    "right": (1, 0), "down-right": (math.sqrt(.5), math.sqrt(.5)), "down": (0, 1),
    "down-left": (-math.sqrt(.5), math.sqrt(.5)), "left": (-1, 0), "up-left": (-math.sqrt(.5), -math.sqrt(.5)),
    "up": (0, -1), "up-right": (math.sqrt(.5), -math.sqrt(.5)),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("striped", "checkered", "cloudy", "plain")
FRAME_RATE = 8.0


@dataclass(frozen=True)
class Scene:
    """The content of a clip. Lengths are relative to the picture's side, so that a scene renders at any size."""

    shape: str
    colour: str
    direction: str
    background: str
    position: tuple[float, float]  # of the centre in the first frame
    speed: float  # sides a frame
    radius: float
    brightness: float  # of the background, 0 to 1
    tint: tuple[float, float, float]  # added to the background's three channels
    contrast: float
    waves: tuple[tuple[int, int, float], ...]  # the texture's whole cycles across and down, and phase
    drift: tuple[float, float]  # of the background, sides a frame

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction} over a {self.background} background"


def sample_scene(seed: int) -> Scene:
    """Sample a scene, as a pure function of `seed`."""
    rng = np.random.default_rng(np.random.SeedSequence([0x0D7AE, seed]))
    background = str(rng.choice(BACKGROUNDS))
    if background == "striped":
        cycles = [((3, 0), (0, 3), (2, 2), (2, -2))[rng.integers(4)]]
    elif background == "checkered":
        cycles = [(2, 2), (2, -2)] if rng.random() < .5 else [(3, 0), (0, 3)]
    elif background == "cloudy":
        cycles = [(int(a), int(b)) for a, b in rng.integers(-2, 3, (5, 2))]
    else:
        cycles = [((1, 0), (0, 1), (1, 1), (1, -1))[rng.integers(4)]]
    angle, pace = rng.uniform(0, 2 * math.pi), rng.uniform(.002, .010)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        direction=str(rng.choice(list(DIRECTIONS))),
        background=background,
        position=(float(rng.random()), float(rng.random())),
        speed=float(rng.uniform(.028, .040)),  # 1.8 to 2.6 pixels a frame at 64
        radius=float(rng.uniform(.13, .18)),
        brightness=float(rng.uniform(.30, .60)),
        tint=(float(rng.uniform(-.03, .03)), float(rng.uniform(-.03, .03)), float(rng.uniform(-.03, .03))),
        contrast=float(rng.uniform(.08, .13)),
        waves=tuple((a, b, float(rng.uniform(0, 2 * math.pi))) for a, b in cycles),
        drift=(pace * math.cos(angle), pace * math.sin(angle)),
    )


def render(scene: Scene, frames: int, size: int = 64) -> np.ndarray:
    """Render a scene as uint8 (frames, size, size, 3)."""
    axis = (np.arange(size, dtype=np.float32) + .5) / size
    t = np.arange(frames, dtype=np.float32)[:, None, None]
    texture = _texture(scene, axis[None, None, :] - scene.drift[0] * t, axis[None, :, None] - scene.drift[1] * t)
    ground = (scene.brightness + scene.contrast * texture)[..., None] + np.asarray(scene.tint, np.float32)
    dx, dy = DIRECTIONS[scene.direction]
    x = _wrap(axis[None, None, :] - (scene.position[0] + scene.speed * dx * t))
    y = _wrap(axis[None, :, None] - (scene.position[1] + scene.speed * dy * t))
    cover = np.clip(.5 - _distance(scene.shape, x, y, scene.radius) * size, 0, 1)[..., None]  # antialiased edge
    colour = np.asarray(COLOURS[scene.colour], np.float32) / 255
    return np.round(255 * np.clip(ground * (1 - cover) + colour * cover, 0, 1)).astype(np.uint8)


def _wrap(offset: np.ndarray) -> np.ndarray:
    return (offset + .5) % 1 - .5


def _texture(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute the background, about -1 to 1, from whole cycles, so that it has no seam on the torus."""
    waves = [np.sin(2 * math.pi * (a * x + b * y) + phase) for a, b, phase in scene.waves]
    if scene.background == "checkered":
        return np.tanh(2.5 * waves[0] * waves[1])
    if scene.background == "striped":
        return np.tanh(1.5 * waves[0])
    return np.sum(waves, axis=0) / math.sqrt(len(waves))


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Return the signed distance to the outline, negative inside (accurate within a pixel of it)."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - .88 * r
    if shape == "triangle":
        return np.maximum(abs(x) * .866 - y * .5 - .5 * r, y - .62 * r) - .06 * r
    arm, length = .34 * r, 1.05 * r
    return np.minimum(np.maximum(abs(x) - arm, abs(y) - length), np.maximum(abs(y) - arm, abs(x) - length))
