"""Contact sheets, videos side by side and curves."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from odvae.utils.errors import UserError
from odvae.utils.plots import contact_sheet, curves, side_by_side


def video(frames, height, width):
    """Frame k has the colour (k, 100, 50)."""
    pixels = np.full((frames, height, width, 3), (0, 100, 50), dtype=np.uint8)
    pixels[..., 0] = np.arange(frames)[:, None, None]
    return pixels


def test_a_contact_sheet_shows_evenly_spaced_frames_with_first_and_last(tmp_path):
    path = tmp_path / "sub" / "sheet.png"
    contact_sheet([video(81, 16, 16), video(2, 8, 12)], path, None, columns=5, scale=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 5 * 32 + 6 * 2
    first = [int(sheet[10, 10 + 34 * i, 0]) for i in range(5)]
    second = [int(sheet[2 + 32 + 2 + 8, 10 + 26 * i, 0]) for i in range(3)]
    assert first == [0, 20, 40, 60, 80] and second == [0, 1, 255]
    assert list(path.parent.iterdir()) == [path]


def test_labels_are_drawn_and_truncated(tmp_path):
    contact_sheet([video(3, 32, 32)], tmp_path / "a.png", ["a very long caption, 红色的圆, that fits in no row " * 9])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape[1] == 3 * 32 + 4 * 2
    assert sheet[:18].min() < 100 and sheet[:, -2:].min() == 255  # text above, none of it over the edge
    with pytest.raises(UserError, match="1 labels for 2 videos"):
        contact_sheet([video(3, 8, 8)] * 2, tmp_path / "b.png", ["one"])
    with pytest.raises(UserError, match="no video"):
        contact_sheet([], tmp_path / "b.png")
    with pytest.raises(UserError, match="float"):
        contact_sheet([np.zeros((2, 8, 8, 3))], tmp_path / "b.png")


def test_side_by_side_keeps_both_and_even_widths():
    a, b = video(4, 8, 16), video(4, 8, 10)
    both = side_by_side(a, b)
    assert both.dtype == np.uint8 and both.shape == (4, 8, 28, 3)
    assert np.array_equal(both[:, :, :16], a) and np.array_equal(both[:, :, 18:], b)
    with pytest.raises(UserError, match="only widths"):
        side_by_side(a, video(5, 8, 16))


@pytest.mark.parametrize("log_y", [False, True])
def test_curves_write_one_picture(tmp_path, log_y):
    series = {"tail": ([0, 1, 2], [1.0, 0.1, 0.01]), "average": ([0], [2.0])}
    curves(series, tmp_path / "c.png", "title", "step", "loss", log_y)
    picture = np.asarray(Image.open(tmp_path / "c.png"))
    assert picture.shape[:2] == (540, 960) and picture[..., :3].std() > 5
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_importing_plots_and_config_is_light():
    code = ("import sys, odvae.utils.plots, odvae.utils.config, odvae.utils.progress\n"
            "assert not {'matplotlib', 'PIL', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
