"""uint8 and [-1, 1] are two writings of the same pixels; resizing keeps the picture's shape and centre."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from odvae.data.transforms import resize_crop, to_tensor, to_uint8
from odvae.utils.errors import UserError


def test_every_value_comes_back() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    video = to_tensor(frames)
    assert video.shape == (3, 4, 8, 8) and video.dtype == torch.float32
    assert video.min() == -1 and video.max() == 1
    assert np.array_equal(to_uint8(video), frames)
    assert np.array_equal(to_uint8(video[None]), frames[None])
    assert np.array_equal(to_uint8(video + 0.9 / 255), frames)  # to the nearest, not down
    assert np.array_equal(to_uint8(video * 300), np.where(frames < 128, 0, 255))  # clamped


def test_only_uint8_is_taken_for_pixels() -> None:
    with pytest.raises(UserError, match="float32"):
        to_tensor(np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (20, 20), (33, 65), (7, 90)])
@pytest.mark.parametrize("target", [(16, 16), (16, 24), (40, 24)])
def test_resize_covers_and_crops_the_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    found = resize_crop(frames, *target)
    assert found.shape == (2, *target, 3) and found.dtype == np.uint8
    assert np.array_equal(resize_crop(found, *target), found)
    assert (resize_crop(np.full_like(frames, 77), *target) == 77).all()
    assert np.array_equal(found[1:], resize_crop(frames[1:], *target))  # frame by frame


def test_resize_keeps_the_aspect_and_the_middle() -> None:
    y, x = np.mgrid[-40:40, -60:60] + .5
    disc = np.where(np.hypot(x, y) < 30, 255, 0).astype(np.uint8)[None, :, :, None].repeat(3, -1)
    found = resize_crop(disc, 40, 40)[0, :, :, 0] / 255  # half the size, 10 cut off on either side
    y, x = np.mgrid[-20:20, -20:20] + .5
    assert np.abs(found - (np.hypot(x, y) < 15)).mean() < .03
    assert found == pytest.approx(found[:, ::-1], abs=.01) and found == pytest.approx(found.T, abs=.01)


def test_shrinking_averages_all_pixels() -> None:
    stripes = (np.arange(64) % 2 * 255).astype(np.uint8)[None, None, :, None].repeat(64, 1).repeat(3, -1)
    inner = resize_crop(stripes, 8, 8)[0, :, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() <= 2  # without antialiasing: 0 or 255
