"""The rendered worlds in which prompt accuracy can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from odvae.data.synthetic.flat import render, sample_scene
from odvae.data.synthetic.raycast import render_solids
from odvae.data.synthetic.solids import sample_solid_scene

from .scenes import scene_accuracy, scene_prompts
from .solid_scenes import solid_accuracy, solid_prompts


class World(NamedTuple):
    prompts: Callable[[int], Sequence[Any]]  # each with the field `prompt`
    accuracy: Callable[[np.ndarray, Sequence[Any]], Any]  # of uint8 (N, T, H, W, 3), a dataclass with the field `both`
    render: Callable[[int, int, int], np.ndarray]  # scene's seed, frames, size -> uint8 (T, H, W, 3)
    correct: str  # what `both` means


WORLDS = {
    "flat": World(scene_prompts, scene_accuracy, lambda seed, frames, size: render(sample_scene(seed), frames, size),
                  "both the prompt's colour and direction (chance .021; of the pattern .250)"),
    "solids": World(solid_prompts, solid_accuracy,
                    lambda seed, frames, size: render_solids(sample_solid_scene(seed), frames, size),
                    "the prompt's colours, motion and camera (chance .01 at most)")}
