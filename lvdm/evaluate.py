"""Does a pipeline make what the prompt asks for? Measured on the pixels of generated scenes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from odvae.data.rendered import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES
from odvae.metrics.scene import measure_scene
from odvae.metrics.texture import background_pattern, background_spectrum, contrast_kept
from odvae.runtime.progress import bar

from .defaults import GUIDANCE_SCALE, STEPS
from .pipeline import LVDMPipeline, VideoPiece

MEASURED = 17  # frames, the last ones of each video: in a long video this is where decay shows


@dataclass(frozen=True)
class PromptAccuracy:
    """Shares over all prompts."""

    both: float  # the asked colour and the asked direction are found
    colour: float
    direction: float
    background: float  # the asked pattern is found
    contrast_kept: float  # contrast of the background at the end against the beginning, median over the prompts
    prompts: list[str]
    videos: np.ndarray  # uint8 (prompts, T, H, W, 3)
    right: list[bool]  # by prompt: both


def scene_prompts(count: int) -> list[tuple[str, str, str, str]]:
    """`count` (prompt, colour, direction, background): each colour with each direction once in every 48, shapes and
    backgrounds in turn."""
    pairs = list(itertools.product(COLOURS, DIRECTIONS))
    order = np.random.default_rng(0).permutation(len(pairs))
    made = []
    for i in range(count):
        colour, direction = pairs[order[i % len(pairs)]]
        shape, background = SHAPES[i % len(SHAPES)], BACKGROUNDS[(i // len(SHAPES)) % len(BACKGROUNDS)]
        prompt = f"a {colour} {shape} moving {direction} over a {background} background"
        made.append((prompt, colour, direction, background))
    return made


def prompt_accuracy(pipeline: LVDMPipeline, count: int, frames: int, *, batch: int = 24, steps: int = STEPS,
                    guidance_scale: float = GUIDANCE_SCALE, seed: int = 1000) -> PromptAccuracy:
    """Generate a video for each of `count` scene prompts and measure its last 17 frames.

    Chance is 1/48 for colour and direction (six and eight), and 1/4 for the background's pattern.
    """
    asked = scene_prompts(count)
    videos, groups = [], None
    with bar(None, f"generate {count} x {frames} frames", "group") as progress:
        for first in range(0, count, batch):
            part = asked[first : first + batch]
            pieces = []
            for event in pipeline.stream([prompt for prompt, *_ in part], frames=frames, steps=steps,
                                         guidance_scale=guidance_scale, seed=seed + first):
                if isinstance(event, VideoPiece):
                    pieces.append(event.frames)
                    if groups is None:
                        groups = event.groups
                        progress.reset(total=groups * -(-count // batch))
                    progress.update(1)
            videos.append(np.concatenate(pieces, axis=1))
    made = np.concatenate(videos)
    ends = made[:, -MEASURED:]
    colours, directions, backgrounds = [], [], []
    for end, (_, colour, direction, background) in zip(ends, asked, strict=True):
        found = measure_scene(end, colour)
        colours.append(found.colour == colour)
        directions.append(found.direction == direction)
        backgrounds.append(background_pattern(background_spectrum(end)) == background)
    both = [c and d for c, d in zip(colours, directions, strict=True)]
    kept = [contrast_kept(video[:MEASURED], end) for video, end in zip(made, ends, strict=True)]
    return PromptAccuracy(both=float(np.mean(both)), colour=float(np.mean(colours)),
                          direction=float(np.mean(directions)), background=float(np.mean(backgrounds)),
                          contrast_kept=float(np.median(kept)), prompts=[prompt for prompt, *_ in asked], videos=made,
                          right=both)
