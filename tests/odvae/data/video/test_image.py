"""Photos and animations: colour profiles, damage, limits."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from odvae.data.video.file import ReadPolicy
from odvae.data.video.image import AnimatedImage, read_image
from odvae.data.video.reader import VideoError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def gradient(size: int = 32) -> Any:
    rows, columns = np.mgrid[:size, :size] * 255 // size
    return Image.fromarray(np.stack([rows, columns, 255 - rows], -1).astype(np.uint8))


@pytest.mark.parametrize("profile", [SRGB, SRGB[:60], b"no profile", LAB], ids=["sRGB", "cut off", "text", "Lab"])
def test_a_damaged_profile_leaves_the_colours_as_they_are(profile: bytes, tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png", icc_profile=profile)
    found = read_image(tmp_path / "a.png")
    assert np.abs(found[0].astype(int) - np.asarray(gradient()).astype(int)).max() <= 1


def test_a_palette_is_resolved_before_its_profile_is_applied(tmp_path: Path) -> None:
    picture = gradient().quantize(16)
    picture.save(tmp_path / "a.png", icc_profile=SRGB)
    found = read_image(tmp_path / "a.png")
    assert np.abs(found[0].astype(int) - np.asarray(picture.convert("RGB")).astype(int)).max() <= 1


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    gradient(256).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("half.png", "damaged or truncated"), ("text.png", "not a readable image"),
                          ("gone.png", "there is no such file")):
        with pytest.raises(VideoError, match=rf"{name}\b.*{message}"):
            read_image(tmp_path / name)


def test_an_animation_that_is_refused_is_closed(tmp_path: Path) -> None:
    frames = [gradient(), gradient().rotate(90)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(VideoError, match="too large: 32x32"):
            AnimatedImage(tmp_path / "a.gif", ReadPolicy("GIF", frozenset({"gif"}), 16, 10.0))
        gc.collect()
    with pytest.raises(VideoError, match="too long: 2"):
        AnimatedImage(tmp_path / "a.gif", ReadPolicy("GIF", frozenset({"gif"}), 64, 0.1))
