"""Training windows: lists of files, photos, buckets, crops; all of it a function of (seed, step, rank)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from odvae.data import probing
from odvae.data.dataset import BucketConfig, DataConfig, VideoClipDataset
from odvae.data.manifests import ClipRef, read_manifest, read_rows
from odvae.data.transforms import to_float
from odvae.data.video.reader import write_video
from odvae.utils.errors import UserError

ROWS = [{"path": "a.mp4", "caption": "a, red one", "start": 0.5, "end": 2.0}, {"path": "sub/b.mp4", "caption": "b"}]


def write_lists(folder: Path) -> list[Path]:
    (folder / "l.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (folder / "l.csv").write_text('path,caption,start,end,width\na.mp4,"a, red one",0.5,2.0,64\nsub/b.mp4,b,,,64\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "l.parquet")
    return [folder / f"l.{kind}" for kind in ("jsonl", "csv", "parquet")]


def test_lists_of_all_formats_are_equal(tmp_path):
    for path in write_lists(tmp_path):
        assert read_manifest(path) == [ClipRef(tmp_path / "a.mp4", 0.5, 2.0), ClipRef(tmp_path / "sub/b.mp4")]
        assert [row.captions for row in read_rows(path)] == [("a, red one",), ("b",)]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("l.jsonl", '{"path": "a.mp4"}\n{"file": "b.mp4"}', "row 2 has no `path`"),
    ("l.jsonl", '{"path": "a.mp4"}\n{', "line 2 is not JSON"),
    ("l.csv", "path,start\na.mp4,soon\n", "row 1: start is 'soon'"),
    ("l.csv", "path,start,end\na.mp4,3,2\n", "0 <= start < end"),
    ("l.csv", "path\n", "has no rows"),
    ("l.txt", "a.mp4", r"\.jsonl, \.csv, \.parquet"),
    ("l.parquet", "a.mp4", "cannot read the list"),
])
def test_mistakes_in_a_list_name_the_row(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / name)


def test_windows_stay_inside_a_listed_span(clips, tmp_path):
    videos = sorted(clips.glob("*.mp4"))[:2]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"path": str(v), "start": 1.0, "end": 2.0}) + "\n" for v in videos))
    data = VideoClipDataset(DataConfig(files=path, frames=5, height=32, width=32, held_out=0))
    assert [clip.frames for clip in data.clips] == [8, 8]  # a second at 8 fps
    drawn = {name for step in range(20) for name in data.batch(step, 0, 2, 0).names}
    begins = {float(name.split()[-2]) for name in drawn}
    assert begins == {1.0, 1.12, 1.25, 1.38}


@pytest.fixture
def mixed(clips, tmp_path) -> Path:
    """Class folders: four videos and two photos, 24x48; and a photo that is none."""
    for kind in ("first", "second"):
        (tmp_path / kind).mkdir()
    for video in sorted(clips.glob("*.mp4"))[:4]:
        (tmp_path / "first" / video.name).symlink_to(video)
    for i in range(2):
        Image.fromarray(np.full((24, 48, 3), 100 * i, np.uint8)).save(tmp_path / f"second/{i}.png")
    (tmp_path / "second/broken.png").write_text("no picture")
    return tmp_path


def test_buckets_mix_images_and_clips_as_a_function_of_seed_and_step(mixed):
    config = DataConfig(folder=mixed, held_out=1, flip=True, crop="random", buckets=(
        BucketConfig(frames=1, height=16, width=32, batch=5), BucketConfig(frames=9, height=16, width=16, weight=3)))
    data, again = VideoClipDataset(config), VideoClipDataset(config.model_copy(update={"memory_mb": 0}))
    assert [path.name for path, _ in data.set_aside] == ["broken.png"]
    assert data.held_out()[0].shape == (3, 9, 16, 16)
    shapes = []
    for step in range(40):
        one = data.batch(step, 0, 2, seed=3)
        shapes.append(tuple(one.video.shape))
        other = data.batch(step, 1, 2, seed=3)
        assert other.video.shape == one.video.shape and other.names != one.names  # of one kind in all processes
        repeated = again.batch(step, 0, 2, seed=3)
        assert repeated.video.equal(one.video) and repeated.names == one.names
        held = str(data.clips[data.held_out_indices[0]].path)
        assert not any(held in name for name in one.names)
        if one.frames == 18:
            assert not any(".png" in name for name in one.names)
    assert set(shapes) == {(5, 3, 1, 16, 32), (2, 3, 9, 16, 16)}
    assert 22 <= shapes.count((2, 3, 9, 16, 16)) <= 38  # three of four


def test_a_length_that_only_reserved_clips_have_is_refused(tmp_path):
    """As where a second stage adds longer windows, and the first one held out the only long file."""
    for k, frames in enumerate((9, 5, 5)):
        write_video(tmp_path / f"{k}.mp4", [np.zeros((frames, 16, 16, 3), np.uint8)], 8.0)
    buckets = tuple(BucketConfig(frames=frames, height=16, width=16) for frames in (5, 9))
    with pytest.raises(UserError, match=r"no clip of .* is left to train windows of 9 frames"):
        VideoClipDataset(DataConfig(folder=tmp_path, buckets=buckets), reserved=frozenset({tmp_path / "0.mp4"}))


def test_whole_files_are_held_out(tmp_path, caplog):
    """Spans of one film lie on one side, and so does a copy of it under another name."""
    rng = np.random.default_rng(0)
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", [rng.integers(0, 255, (40, 16, 16, 3), np.uint8)], 8.0)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "z-again.mp4")
    rows = [(name, start) for start in (0, 1, 2, 3) for name in ("a", "b", "c", "z-again")]
    (tmp_path / "l.csv").write_text("film,begin,until\n" + "".join(f"{n}.mp4,{s},{s + 1}\n" for n, s in rows))
    config = DataConfig(files=tmp_path / "l.csv", columns=["path=film", "start=begin", "end=until"], frames=5,
                        height=16, width=16)
    caplog.set_level("INFO", "odvae")
    for held_out, films, message in ((1, "a", "held out: 1 clips, and 7 more of their 2 files"),
                                     (2, "ab", "held out: 2 clips, and 10 more of their 3 files"), (0, "", "")):
        data = VideoClipDataset(config.model_copy(update={"held_out": held_out}))
        assert [data.clips[i].path.stem for i in data.held_out_indices] == list(films) and message in caplog.text
        held = {name for name in ("a", "b", "c", "z-again") if name[0] in films or ("again" in name and "a" in films)}
        names = [name for step in range(60) for name in data.batch(step, 0, 2, 0).names]
        trained = {Path(name.partition(" from ")[0]).stem for name in names}
        assert trained == {"a", "b", "c", "z-again"} - held
        stage = VideoClipDataset(config, reserved=frozenset({tmp_path / f"{name}.mp4" for name in films}))
        assert {path.stem for path in stage.reserved} == held and not stage.held_out_indices  # of a stage before
    (tmp_path / "l.csv").write_text("path,start,end\na.mp4,0,2\na.mp4,2,4\n")
    data = VideoClipDataset(DataConfig(files=tmp_path / "l.csv", frames=5, height=16, width=16, held_out=1))
    assert not data.held_out_indices and len(data.clips) == 2  # of one film there is nothing to hold out


def test_names_that_are_no_utf_8_and_files_that_are_left_out(tmp_path, caplog):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    write_video(tmp_path / "a.mp4", [np.zeros((9, 16, 16, 3), np.uint8)], 8.0)
    shutil.copy(tmp_path / "a.mp4", path)
    (tmp_path / "b.heic").touch()
    (tmp_path / "a.txt").touch()
    data = VideoClipDataset(DataConfig(folder=tmp_path, frames=5, height=16, width=16, held_out=0))
    assert {clip.path for clip in data.clips} == {tmp_path / "a.mp4", path} and not data.set_aside
    assert data.batch(0, 0, 4, 0).video.shape == (4, 3, 5, 16, 16)
    assert "left out, by extension: 1 .heic" in caplog.text


def test_random_crops_and_flips_show_all_of_a_picture(tmp_path):
    ramp = np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], 24, axis=0).repeat(3, axis=2)  # 24 x 48
    Image.fromarray(ramp).save(tmp_path / "a.png")

    def columns(**options):
        data = VideoClipDataset(DataConfig(folder=tmp_path, frames=1, height=24, width=24, held_out=0, **options))
        windows = to_float(torch.cat([data.batch(step, 0, 4, 0).video for step in range(30)]))[:, 0, 0, 0]
        return {tuple(row.tolist()) for row in windows}

    def flipped(rows):
        return {row[::-1] for row in rows}

    centre = columns()
    assert len(centre) == 1
    assert columns(flip=True) == centre | flipped(centre)
    random = columns(crop="random")
    assert len(random) > 15
    assert min(min(row) for row in random) < -0.95 and max(max(row) for row in random) > 0.75


def test_each_file_is_probed_by_one_of_the_processes(monkeypatch):
    paths, seen = [Path(f"{i}.mp4") for i in range(5)], []
    for name, value in {"num_processes": lambda: 2, "process_index": lambda: 1,
                        "gather": lambda mine: [dict.fromkeys(paths[::2]), mine],
                        "probe": lambda path: seen.append(path) or path.name}.items():
        monkeypatch.setattr(probing, name, value)
    results = probing.probe_files(paths)
    assert sorted(seen) == paths[1::2]
    assert list(results.items()) == [(path, path.name if i % 2 else None) for i, path in enumerate(paths)]


def test_photos_are_not_clips(mixed):
    with pytest.raises(UserError, match=r"no clip .* has 9 frames"):
        (mixed / "only").mkdir()
        (mixed / "only/list.csv").write_text("path\n../second/0.png\n")
        VideoClipDataset(DataConfig(files=mixed / "only/list.csv", frames=9))


def test_zoom_shows_a_part_at_a_larger_scale(tmp_path):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (9, 256, 256, 3))
    write_video(tmp_path / "ramp.mp4", ramp, 8)

    def spans(*zoom: float) -> list[float]:
        """How much of the ramp each window shows, as a share of the whole."""
        data = VideoClipDataset(
            DataConfig(folder=tmp_path, frames=5, height=64, width=64, held_out=0, crop="random", zoom=zoom)
        )
        drawn = torch.cat([data.batch(step, 0, 2, 0).video for step in range(20)])
        again = torch.cat([data.batch(step, 0, 2, 0).video for step in range(20)])
        assert torch.equal(drawn, again)
        rows = to_float(drawn)[:, :, 0, 32].mean(1)
        return [float((row[-1] - row[0]) * 64 / 63 / 2) for row in rows]

    assert spans(1.0, 1.0) == pytest.approx([1.0] * 40, abs=.03)
    shares = spans(1.0, 4.0)
    assert min(shares) == pytest.approx(.25, abs=.05) and max(shares) == pytest.approx(1, abs=.1)
    assert sorted(shares)[20] == pytest.approx(.5, abs=.15)  # the middle of a logarithmic scale
    assert spans(2.0, 2.0) == pytest.approx([.5] * 40, abs=.03)
    assert spans(1.0, 8.0)[:5] == pytest.approx(spans(1.0, 8.0)[:5]) and min(spans(8.0, 8.0)) > .22  # never enlarged


@pytest.mark.parametrize("zoom", [(.5, 2), (2, 1), (1, float("inf"))])
def test_a_zoom_that_cannot_cover_is_refused(zoom):
    with pytest.raises(ValueError, match=r"1 <= min <= max|should be a finite number"):
        DataConfig(zoom=zoom)
