"""Prompt accuracy: does a video show the scene of its prompt? Measured on pixels, for captions of rendered clips."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from odvae.data.synthetic import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from odvae.metrics.scene import measure_scene
from odvae.metrics.texture import background_pattern, background_spectrum, contrast_kept

MEASURED_FRAMES = 17  # the last ones of each video: in a long video this is where decay shows


class ScenePrompt(NamedTuple):
    """A prompt and the scene that it describes."""

    prompt: str
    colour: str
    direction: str
    background: str


@dataclass(frozen=True)
class SceneAccuracy:
    """Shares over all videos. Chance is 1/6 for the colour, 1/8 for the direction, 1/4 for the background's pattern."""

    both: float  # colour and direction are correct
    colour: float
    direction: float
    background: float
    contrast_kept: float  # background contrast at the end / at the start, median over the videos
    right: list[bool]  # per video: colour and direction are correct


def scene_prompts(count: int) -> list[ScenePrompt]:
    """Prompts with each colour in each direction once in every 48, and shapes and backgrounds in turn."""
    pairs = list(itertools.product(COLOURS, DIRECTIONS))
    order = np.random.default_rng(0).permutation(len(pairs))
    prompts = []
    for i in range(count):
        colour, direction = pairs[order[i % len(pairs)]]
        shape, background = SHAPES[i % len(SHAPES)], BACKGROUNDS[(i // len(SHAPES)) % len(BACKGROUNDS)]
        prompt = f"a {colour} {shape} moving {direction} over a {background} background"
        prompts.append(ScenePrompt(prompt, colour, direction, background))
    return prompts


def scene_accuracy(videos: np.ndarray, prompts: Sequence[ScenePrompt]) -> SceneAccuracy:
    """Measure uint8 videos (N, T, H, W, 3) by their last 17 frames."""
    tails = videos[:, -MEASURED_FRAMES:]
    scenes = [measure_scene(tail, prompt.colour) for tail, prompt in zip(tails, prompts, strict=True)]
    colours = [scene.colour == prompt.colour for scene, prompt in zip(scenes, prompts, strict=True)]
    directions = [scene.direction == prompt.direction for scene, prompt in zip(scenes, prompts, strict=True)]
    backgrounds = [background_pattern(background_spectrum(tail)) == prompt.background
                   for tail, prompt in zip(tails, prompts, strict=True)]
    both = [c and d for c, d in zip(colours, directions, strict=True)]
    contrasts = [contrast_kept(video[:MEASURED_FRAMES], tail) for video, tail in zip(videos, tails, strict=True)]
    return SceneAccuracy(both=float(np.mean(both)), colour=float(np.mean(colours)),
                         direction=float(np.mean(directions)), background=float(np.mean(backgrounds)),
                         contrast_kept=float(np.median(contrasts)), right=both)
