"""What a cache is built from: lists and class folders, as a training reads them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from tiny_cache import SHAPE, tiny_vae, write_noise, write_noise_photo

from odvae.cache import LatentCache, build_cache
from odvae.data.dataset import DataConfig, VideoClipDataset
from odvae.utils.errors import UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 5 frames, clip_4 of 10; clip_1 has a caption; and a photo."""
    folder = tmp_path_factory.mktemp("videos")
    for k in (0, 1, 2, 4, 5):
        write_noise(folder / f"clip_{k}.mp4", k, frames=10 if k == 4 else 5, size=(24, 64))
    (folder / "clip_1.txt").write_text("caption 1")
    write_noise_photo(folder / "photo.png")
    return folder


def rows_of(cache: Path) -> list[tuple[str, float, int, str, bool]]:
    keys = ("path", "start", "frames", "caption", "caption_from_name")
    rows = [row | {"caption": " | ".join(row["captions"])} for row in LatentCache(cache).index.to_pylist()]
    return sorted(tuple(row[key] for key in keys) for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_list_is_built_as_a_training_reads_it(videos: Path, tmp_path: Path, kind: str) -> None:
    """Spans and captions of the list, one of a .txt, one of a name; a file that is gone is set aside."""
    rows = [{"path": "clip_4.mp4", "caption": "late", "start": .625, "end": None},
            {"path": "clip_4.mp4", "caption": "early", "start": None, "end": .625},
            {"path": "clip_1.mp4", "caption": None, "start": None, "end": None},
            {"path": "photo.png", "caption": "a photo", "start": None, "end": None},
            {"path": "gone.mp4", "caption": None, "start": None, "end": None},
            {"path": "clip_5.mp4", "caption": None, "start": .25, "end": None}]
    folder = tmp_path / "lists"
    folder.mkdir()
    for row in rows:
        row["path"] = os.path.relpath(videos / row["path"], folder)
    path, table = folder / f"some.{kind}", pa.Table.from_pylist(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    summary = build_cache(path, tmp_path / "cache", tiny_vae(), **SHAPE)
    assert summary.done == 4 and summary.captions_from_names == 0
    assert ["gone.mp4" in entry.reason for entry in summary.set_aside] == [True, False]
    assert "from 0.25 s on its 0.38 s give 3 frames" in summary.set_aside[1].reason
    names = {name: os.path.relpath(videos / name, folder) for name in ("clip_1.mp4", "clip_4.mp4", "photo.png")}
    assert rows_of(tmp_path / "cache") == sorted([
        (names["clip_4.mp4"], .625, 5, "late", False), (names["clip_4.mp4"], 0.0, 5, "early", False),
        (names["clip_1.mp4"], 0.0, 5, "caption 1", False), (names["photo.png"], 0.0, 1, "a photo", False)])
    trained = VideoClipDataset(DataConfig(files=path, frames=5, height=16, width=16, held_out=0))
    assert [(clip.path.name, clip.start, clip.frames) for clip in trained.clips] == [
        ("clip_4.mp4", .625, 5), ("clip_4.mp4", 0.0, 5), ("clip_1.mp4", 0.0, 5)]
    with pytest.raises(UserError, match="is a file; a folder"):
        build_cache(videos / "clip_1.txt", tmp_path / "other", tiny_vae(), **SHAPE)


def test_class_folders_give_captions_where_there_are_no_others(videos: Path, tmp_path: Path) -> None:
    for name, kind in (("clip_1.mp4", "first_kind"), ("clip_2.mp4", "first_kind"), ("clip_0.mp4", "second")):
        (tmp_path / "source" / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / name, tmp_path / "source" / kind / name)
    (tmp_path / "source/first_kind/clip_2.txt").write_text("its own")
    summary = build_cache(tmp_path / "source", tmp_path / "cache", tiny_vae(), **SHAPE)
    assert (summary.done, summary.captions_from_names) == (3, 0)
    assert rows_of(tmp_path / "cache") == [("first_kind/clip_1.mp4", 0.0, 5, "first kind", False),
                                           ("first_kind/clip_2.mp4", 0.0, 5, "its own", False),
                                           ("second/clip_0.mp4", 0.0, 5, "second", False)]
    assert len(VideoClipDataset(DataConfig(folder=tmp_path / "source", frames=5, height=16, width=16)).clips) == 3
