"""Prompt accuracy in the world of solids: a rendered scene follows its own prompt, and not another's."""

from __future__ import annotations

import numpy as np

from lvdm.evaluation.solid_scenes import SolidPrompt, solid_accuracy, solid_prompts
from lvdm.evaluation.worlds import WORLDS
from odvae.data.synthetic.captions import scene_facts, solid_caption
from odvae.data.synthetic.raycast import render_solids
from odvae.data.synthetic.solids import MOTIONS, TONES, sample_solid_scene


def test_prompts_have_every_colour_in_every_motion():
    prompts = solid_prompts(54)
    assert len({(facts.colours[0], facts.motion) for _, facts in prompts}) == len(TONES) * len(MOTIONS) == 54
    assert prompts == solid_prompts(54) and len({prompt for prompt, _ in prompts}) == 54


def test_scenes_follow_their_own_prompts_alone():
    scenes = [sample_solid_scene(seed) for seed in (10_000, 10_003, 10_011)]
    videos = np.stack([render_solids(scene, 19, 64) for scene in scenes])
    prompts = [SolidPrompt(solid_caption(scene), scene_facts(scene)) for scene in scenes]
    accuracy = WORLDS["solids"].accuracy(videos, prompts)
    assert accuracy.right == [True] * 3 and accuracy.both == accuracy.colour == accuracy.camera == 1
    assert .8 < accuracy.contrast_kept < 1.2
    assert solid_accuracy(videos, prompts[1:] + prompts[:1]).both == 0
