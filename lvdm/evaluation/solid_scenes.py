"""Prompt accuracy in the world of solids: does a video show the colours, the motion and the camera of its prompt?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from odvae.data.synthetic.captions import SceneFacts, scene_facts, solid_caption
from odvae.data.synthetic.solids import CAMERAS_BY_MOTION, SHAPES, TONES, make_scene
from odvae.metrics.solids import ground_contrast, measure_solids

MEASURED_FRAMES = 17  # the last ones of each video: in a long video this is where decay shows
PROMPTS_FROM = 97_000_000  # seeds of the prompts' scenes: `odvae render --seed 97` would render others of these words


class SolidPrompt(NamedTuple):
    """A prompt and what it states."""

    prompt: str
    facts: SceneFacts


@dataclass(frozen=True)
class SolidAccuracy:
    """Shares over all videos. Chance is about 1/6 for the colour, 1/9 for the motion and 1/7 for the camera."""

    both: float  # the colour, the motion and the camera are correct
    colour: float  # the subject's colour is shown, and none that the prompt does not name
    motion: float
    camera: float
    contrast_kept: float  # the ground's contrast at the end / at the start, median over the videos
    right: list[bool]  # per video: the colour, the motion and the camera are correct


def solid_prompts(count: int) -> list[SolidPrompt]:
    """Prompts with each colour in each motion once in every 54; shapes, cameras and words by chance."""
    pairs = list(itertools.product(TONES, CAMERAS_BY_MOTION))
    order = np.random.default_rng(0).permutation(len(pairs))
    prompts = []
    for i in range(count):
        colour, motion = pairs[order[i % len(pairs)]]
        rng = np.random.default_rng(np.random.SeedSequence([PROMPTS_FROM, i]))
        cameras = CAMERAS_BY_MOTION[motion]
        chances = np.array(list(cameras.values())) / sum(cameras.values())
        camera = str(rng.choice(list(cameras), p=chances))
        scene = make_scene(rng, motion, camera, colour, str(rng.choice(list(SHAPES))), PROMPTS_FROM + i)
        prompts.append(SolidPrompt(solid_caption(scene), scene_facts(scene)))
    return prompts


def solid_accuracy(videos: np.ndarray, prompts: Sequence[SolidPrompt]) -> SolidAccuracy:
    """Measure uint8 videos (N, T, H, W, 3) by their last 17 frames."""
    tails, facts = videos[:, -MEASURED_FRAMES:], [prompt.facts for prompt in prompts]
    scenes = [measure_solids(tail, fact.colours[0]) for tail, fact in zip(tails, facts, strict=True)]
    colours = [fact.colours[0] in scene.colours and set(scene.colours) <= set(fact.colours)
               for scene, fact in zip(scenes, facts, strict=True)]
    motions = [scene.motion == fact.motion for scene, fact in zip(scenes, facts, strict=True)]
    cameras = [scene.camera == fact.camera for scene, fact in zip(scenes, facts, strict=True)]
    right = [all(each) for each in zip(colours, motions, cameras, strict=True)]
    contrasts = [ground_contrast(tail) / max(ground_contrast(video[:MEASURED_FRAMES]), 1e-6)
                 for video, tail in zip(videos, tails, strict=True)]
    return SolidAccuracy(both=float(np.mean(right)), colour=float(np.mean(colours)), motion=float(np.mean(motions)),
                         camera=float(np.mean(cameras)), contrast_kept=float(np.median(contrasts)), right=right)
