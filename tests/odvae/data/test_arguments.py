"""Arguments that make no sense are refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from odvae.data import VideoWriter, read_stream, resize_crop, to_uint8, write_video
from odvae.data.synthetic import write_rendered
from odvae.utils.errors import UserError

FRAMES = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(("call", "message"), [
    (lambda path: write_video(path, [FRAMES], 0.0), "the rate must be above 0"),
    (lambda path: write_video(path, [FRAMES], float("nan")), "the rate must be above 0"),
    (lambda path: VideoWriter(path, 8.0, crf=52), "crf from 0 to 51"),
    (lambda path: resize_crop(FRAMES, 0, 16), "both sides must be at least 1"),
    (lambda path: to_uint8(torch.zeros(3, 16, 16)), r"expected a video \(..., C, T, H, W\)"),
    (lambda path: write_rendered(path.parent / "new", 0), "both must be at least 1"),
    (lambda path: list(read_stream(path.with_name("good.mp4"), chunk=0)), "must be at least 1")])
def test_refused(call: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", [FRAMES], 8.0)
    with pytest.raises(UserError, match=message):
        call(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["good.mp4"]


def test_a_writer_that_was_closed_takes_no_frames(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", 8.0)
    writer.write(FRAMES)
    writer.close()
    writer.close()  # does nothing
    with pytest.raises(ValueError, match="closed already"):
        writer.write(FRAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
