"""Scenes of the world of solids are measured to be what they were rendered as; the ground's motion is that of the
camera."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from odvae.data.synthetic.raycast import FRAME_RATE, render_solids
from odvae.data.synthetic.solids import sample_solid_scene
from odvae.metrics.filters import blurred
from odvae.metrics.ground_motion import ground_motion
from odvae.metrics.solids import measure_solids

SEEDS = (10_000, 10_003, 10_008, 10_011)


def test_scenes_are_measured_correctly():
    for seed in SEEDS:
        scene = sample_solid_scene(seed)
        frames = render_solids(scene, 17, 64)
        measured = measure_solids(frames, scene.subject.colour)
        assert (measured.motion, measured.camera) == (scene.motion, scene.camera), scene
        assert scene.subject.colour in measured.colours
        assert set(measured.colours) <= {solid.colour for solid in scene.solids}


@pytest.mark.parametrize(("camera", "expected"), [
    ("still", (0, 0, 0)), ("approaches", (0, -1, 0)), ("retreats", (0, 1, 0)), ("orbits", (0, 0, 1))])
def test_the_ground_moves_against_the_camera(camera, expected):
    scene = replace(sample_solid_scene(10_003), motion="rests", camera=camera, ground="mottled")
    rates = scene.rates
    motion = ground_motion(render_solids(scene, 6, 64))
    speed = np.array([0, rates.camera_speed, rates.camera_turn]) / FRAME_RATE
    assert motion == pytest.approx(tuple(speed * expected), abs=.02)


def test_a_blur_keeps_the_mean_and_a_constant():
    frames = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)
    assert blurred(np.full_like(frames, 7)) == pytest.approx(7)
    inner = np.zeros((1, 9, 9), np.uint8)
    inner[0, 4, 4] = 160
    assert blurred(inner).sum() == pytest.approx(160) and blurred(inner)[0, 4, 4] == pytest.approx(160 * (6 / 16)**2)
