"""Thumbnails of uploads, made by a process of their own."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.ui.html import thumbnail as module
from app.ui.html.thumbnail import SIDE, thumbnail
from odvae.data.video.reader import write_video


def picture(url: str) -> Image.Image:
    assert url.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_pictures_and_videos_have_a_thumbnail(tmp_path: Path) -> None:
    Image.new("RGBA", (400, 200), "red").save(tmp_path / "a.png")
    small = picture(thumbnail(tmp_path / "a.png", "image"))
    assert (small.size, small.convert("RGB").getpixel((80, 40))[0]) == ((SIDE, SIDE // 2), 255)
    write_video(tmp_path / "a.mp4", [np.full((3, 64, 48, 3), 200, np.uint8)], 8.0)
    assert picture(thumbnail(tmp_path / "a.mp4", "video")).size == (48, 64)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_that_cannot_be_read_has_none(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert thumbnail(tmp_path / "a", kind) == thumbnail(tmp_path / "gone", kind) == ""


def test_a_file_that_takes_too_long_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (400, 200)).save(tmp_path / "slow.png")
    monkeypatch.setattr(module, "TIMEOUT", 0.001)
    assert thumbnail(tmp_path / "slow.png", "image") == ""
