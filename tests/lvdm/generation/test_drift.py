"""Drift of synthetic videos with known figures."""

import json

import numpy as np
import pytest

from lvdm.generation.drift import Drift, sharpness


def flat(values, size=8):
    """A video of flat pictures, one a value."""
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_jumps_at_joins_are_separate_from_motion():
    drift = Drift(frame_rate=4.0)
    for first in range(0, 60, 20):  # four frames a group, 5 from frame to frame, 15 across a join where `first` changes
        drift.add(flat([first + 10 * (first // 20) + 5 * i for i in range(4)]))
    report = drift.report()
    assert report["change_elsewhere"] == pytest.approx(5 / 255) and report["change_at_joins"] == pytest.approx(15 / 255)
    assert report["jump"] == pytest.approx(3) and report["frames"] == 12
    assert report["seconds"]["red"] == pytest.approx([7.5 / 255, 37.5 / 255, 67.5 / 255], abs=1e-5)
    assert report["first_to_last"]["colour"] == pytest.approx(60 / 255)


def test_fading_contrast_and_sharpness_are_measured_and_written(tmp_path):
    noise = np.random.default_rng(0).normal(size=(4, 16, 16, 1))
    drift = Drift(frame_rate=4.0)
    drift.add((128 + 40 * noise).clip(0, 255).astype(np.uint8).repeat(3, 3), join=False)
    drift.add((128 + 20 * noise).clip(0, 255).astype(np.uint8).repeat(3, 3), join=False)
    drift.write(tmp_path / "video.mp4")
    report = json.loads((tmp_path / "video.drift.json").read_text())
    assert report["jump"] is None
    assert report["first_to_last"]["contrast"] == pytest.approx(0.5, abs=0.02)
    assert report["first_to_last"]["sharpness"] == pytest.approx(0.25, abs=0.02)
    assert (tmp_path / "video.drift.png").is_file()


def test_sharpness_is_the_variance_of_the_laplacian():
    ramp = np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(8, 0)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-9)
    board = np.indices((8, 8)).sum(0) % 2
    assert sharpness(board.astype(np.float32)) == pytest.approx(16)  # alternating -4 and 4
    assert sharpness(ramp[:2]) == 0
