"""Does a pipeline make what the prompt asks for? Measured on the pixels of generated scenes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from odvae.runtime.progress import bar

from .defaults import GUIDANCE_SCALE, STEPS
from .pipeline import LVDMPipeline, VideoPiece
from .scenes import SceneAccuracy, scene_accuracy, scene_prompts


@dataclass(frozen=True)
class PromptAccuracy(SceneAccuracy):
    """Also what was looked at."""

    prompts: list[str]
    videos: np.ndarray  # uint8 (prompts, T, H, W, 3)


def prompt_accuracy(pipeline: LVDMPipeline, count: int, frames: int, *, batch: int = 24, steps: int = STEPS,
                    guidance_scale: float = GUIDANCE_SCALE, seed: int = 1000) -> PromptAccuracy:
    """Generate a video for each of `count` scene prompts and measure its last 17 frames."""
    asked = scene_prompts(count)
    videos, groups = [], None
    with bar(None, f"generate {count} x {frames} frames", "group") as progress:
        for first in range(0, count, batch):
            part = asked[first : first + batch]
            pieces = []
            for event in pipeline.stream([one.prompt for one in part], frames=frames, steps=steps,
                                         guidance_scale=guidance_scale, seed=seed + first):
                if isinstance(event, VideoPiece):
                    pieces.append(event.frames)
                    if groups is None:
                        groups = event.groups
                        progress.reset(total=groups * -(-count // batch))
                    progress.update(1)
            videos.append(np.concatenate(pieces, axis=1))
    made = np.concatenate(videos)
    return PromptAccuracy(**vars(scene_accuracy(made, asked)), prompts=[one.prompt for one in asked], videos=made)
