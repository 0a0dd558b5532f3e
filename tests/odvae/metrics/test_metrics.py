"""Closed forms of PSNR and SSIM; scenes are measured to be what they were rendered as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from odvae.data.synthetic import render, sample_scene
from odvae.metrics.psnr import psnr
from odvae.metrics.scene import measure_scene
from odvae.metrics.ssim import ssim
from odvae.metrics.texture import background_pattern, background_spectrum, contrast_kept


def test_psnr_of_a_constant_error():
    a = torch.zeros(2, 3, 4, 8, 8)
    assert psnr(a, a + 0.2).numpy() == pytest.approx(np.full((2, 4), 20.0), abs=1e-4)  # .1 of the peak
    assert psnr(a, a).isinf().all()


def test_ssim_of_constants_and_of_equals():
    a, b = torch.full((1, 3, 2, 16, 16), -0.5), torch.full((1, 3, 2, 16, 16), 0.5)
    means, c1 = (0.25, 0.75), 0.01**2
    expected = (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)  # no variance: luminance alone
    assert ssim(a, b).numpy() == pytest.approx(expected, abs=3e-4)  # float32 variances
    noise = torch.rand(2, 3, 2, 16, 16)
    assert ssim(noise, noise).numpy() == pytest.approx(1, abs=1e-5)
    assert (ssim(noise, noise.flip(-1)) < 0.9).all()


def test_scenes_are_measured_correctly():
    for seed in range(60):
        scene = sample_scene(seed)
        measured = measure_scene(render(scene, 9), scene.colour)
        assert (measured.colour, measured.direction) == (scene.colour, scene.direction), scene
        assert measured.speed == pytest.approx(scene.speed, rel=0.35)


def test_scenes_without_shape_or_motion():
    grey = np.full((17, 64, 64, 3), 120, np.uint8)
    assert measure_scene(grey).colour is None
    scene = sample_scene(3)
    still = render(scene, 1).repeat(17, axis=0)
    assert measure_scene(still).direction is None
    assert measure_scene(render(scene, 17)[::-1]).direction not in (None, scene.direction)


def test_a_scene_is_a_function_of_its_number():
    assert sample_scene(7) == sample_scene(7) != sample_scene(8)
    assert np.array_equal(render(sample_scene(7), 3), render(sample_scene(7), 5)[:3])


def test_patterns_are_read_off_the_spectrum_whatever_moves_before_them():
    scenes = [sample_scene(seed) for seed in range(700, 760)]
    found = [background_pattern(background_spectrum(render(scene, 9))) for scene in scenes]
    right = sum(name == scene.background for name, scene in zip(found, scenes, strict=True))
    assert right >= 54  # a cloud can be one wave
    assert background_pattern(background_spectrum(np.full((3, 32, 32, 3), 90, np.uint8))) is None


def test_power_of_a_wave_is_half_its_squared_amplitude_and_contrast_is_a_ratio():
    x = np.arange(64)
    for cycles, place in (((3, 0), (4, 3)), ((0, 2), (6, 0)), ((2, -2), (2, 2))):
        wave = 100 + 40 * np.sin(2 * np.pi * (cycles[0] * x[None, :] + cycles[1] * x[:, None]) / 64 + .3)
        frames = np.repeat(np.round(wave).astype(np.uint8)[None, ..., None], 3, -1)
        power = background_spectrum(frames)
        assert power.sum() == pytest.approx(40**2 / 2, rel=.01)
        assert power[place] == pytest.approx(power.sum() / (1 if cycles[0] else 2), rel=.01)
    faded = (frames.astype(float) / 2 + 50).astype(np.uint8)
    assert contrast_kept(frames, faded) == pytest.approx(.5, rel=.02)
