"""Which clips a folder gives, and what is said of the files that give none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from odvae.data.clips import Listed, caption_of, clips_of, list_folder, list_videos
from odvae.data.video import VideoError, read_clip, write_video
from odvae.runtime.errors import UserError


def write(path: Path, frames: int, rate: float = 8.0) -> Path:
    write_video(path, [np.zeros((frames, 16, 16, 3), np.uint8)], rate)
    return path


def test_listing(tmp_path: Path) -> None:
    for name in ["b.mp4", "A.MKV", "sub/c.webm", "photo.JPG", "notes.txt", ".hidden.mp4", ".trash/d.mp4"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in list_videos(tmp_path)] == ["A.MKV", "b.mp4", "sub/c.webm"]
    assert len(list_videos(tmp_path, images=True)) == 4


def test_folders_without_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        list_videos(tmp_path / "gone")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is a file"):
        list_videos(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"holds no videos \(1 other files in it\); looked for \.mp4 .*\.mkv"):
        list_videos(tmp_path)


def test_captions(tmp_path: Path) -> None:
    video = tmp_path / "a_red-square__moving.mp4"
    assert caption_of(video) == ("a red square moving", True)
    video.with_suffix(".txt").write_bytes("\ufeff  ein Würfel \n".encode())
    assert caption_of(video) == ("ein Würfel", False)
    video.with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(VideoError, match="not UTF-8"):
        caption_of(video)


def test_clips_lie_back_to_back_and_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "long.mp4", 100, 24.0)  # 4.17 s: 33.3 frames at 8 fps
    for frames, stride, starts in [(5, None, [0, .625, 1.25, 1.875, 2.5, 3.125]), (33, None, [0]),
                                   (9, 1.0, [0, 1, 2, 3]), (17, .5, [0, .5, 1, 1.5, 2])]:
        clips = clips_of(path, frames, 8.0, stride)
        assert [clip.start for clip in clips] == starts
        assert len(read_clip(path, clips[-1].start, frames, 8.0)) == frames
    with pytest.raises(VideoError, match=r"4\.17 s give 34 frames at 8 a second, and a clip needs 37"):
        clips_of(path, 37, 8.0)


def test_a_listed_span_is_cut_like_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "long.mp4", 32)  # 4 s
    listed = Listed(path, 1.0, 3.0, "said in the list")
    assert [(clip.start, clip.caption, clip.caption_from_name) for clip in clips_of(listed, 5)] == [
        (1.0, "said in the list", False), (1.625, "said in the list", False), (2.25, "said in the list", False)]
    with pytest.raises(VideoError, match=r"from 1 s on its 2\.00 s give 16 frames .* needs 17"):
        clips_of(listed, 17)
    assert [clip.start for clip in clips_of(Listed(path, 3.0), 5)] == [3.0]
    assert clips_of(path, 5)[0].caption_from_name


def test_folders_are_classes_where_all_files_lie_in_several(tmp_path: Path) -> None:
    def labels() -> dict[str, str | None]:
        return {one.path.name: one.label for one in list_folder(tmp_path)}

    for name in ("riding_a-bike/x1.mp4", "riding_a-bike/x2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(labels().values()) == {None}  # one folder may as well be no class
    (tmp_path / "tennis").mkdir()
    (tmp_path / "tennis/y.mp4").touch()
    assert labels() == {"x1.mp4": "riding a bike", "x2.mp4": "riding a bike", "y.mp4": "tennis"}
    assert caption_of(tmp_path / "tennis/y.mp4", "tennis") == ("tennis", False)
    (tmp_path / "tennis/y.txt").write_text("a serve")
    assert caption_of(tmp_path / "tennis/y.mp4", "tennis") == ("a serve", False)
    for other in ("tennis/indoor/z.mp4", "z.mp4"):  # deeper, or beside the folders: no classes
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
        assert set(labels().values()) == {None}
        (tmp_path / other).unlink()
