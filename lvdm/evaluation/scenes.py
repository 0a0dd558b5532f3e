"""Does a video show the scene that its prompt asks for? Measured on pixels, for the captions of rendered clips."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from odvae.data.synthetic import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from odvae.metrics.scene import measure_scene
from odvae.metrics.texture import background_pattern, background_spectrum, contrast_kept

MEASURED = 17  # frames, the last ones of each video: in a long video this is where decay shows


class ScenePrompt(NamedTuple):
    """A prompt and what it asks for."""

    prompt: str
    colour: str
    direction: str
    background: str


@dataclass(frozen=True)
class SceneAccuracy:
    """Shares over all videos. Chance is 1/6 for the colour, 1/8 for the direction, 1/4 for the background's pattern."""

    both: float  # the asked colour and the asked direction are found
    colour: float
    direction: float
    background: float
    contrast_kept: float  # contrast of the background at the end against the beginning, median over the videos
    right: list[bool]  # by video: both


def scene_prompts(count: int) -> list[ScenePrompt]:
    """Each colour with each direction once in every 48, shapes and backgrounds in turn."""
    pairs = list(itertools.product(COLOURS, DIRECTIONS))
    order = np.random.default_rng(0).permutation(len(pairs))
    made = []
    for i in range(count):
        colour, direction = pairs[order[i % len(pairs)]]
        shape, background = SHAPES[i % len(SHAPES)], BACKGROUNDS[(i // len(SHAPES)) % len(BACKGROUNDS)]
        prompt = f"a {colour} {shape} moving {direction} over a {background} background"
        made.append(ScenePrompt(prompt, colour, direction, background))
    return made


def scene_accuracy(videos: np.ndarray, asked: Sequence[ScenePrompt]) -> SceneAccuracy:
    """Of uint8 (N, T, H, W, 3), by their last 17 frames."""
    ends = videos[:, -MEASURED:]
    found = [measure_scene(end, one.colour) for end, one in zip(ends, asked, strict=True)]
    colours = [scene.colour == one.colour for scene, one in zip(found, asked, strict=True)]
    directions = [scene.direction == one.direction for scene, one in zip(found, asked, strict=True)]
    backgrounds = [background_pattern(background_spectrum(end)) == one.background
                   for end, one in zip(ends, asked, strict=True)]
    both = [c and d for c, d in zip(colours, directions, strict=True)]
    kept = [contrast_kept(video[:MEASURED], end) for video, end in zip(videos, ends, strict=True)]
    return SceneAccuracy(both=float(np.mean(both)), colour=float(np.mean(colours)),
                         direction=float(np.mean(directions)), background=float(np.mean(backgrounds)),
                         contrast_kept=float(np.median(kept)), right=both)
