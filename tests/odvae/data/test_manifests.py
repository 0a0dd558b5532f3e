"""Lists of clips and datasets as people have them: their rows, their columns, and videos inside Parquet files."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_cache import SHAPE, tiny_vae, write_noise

from odvae.cache import LatentCache, build_cache
from odvae.cache.dataset import LatentDataset, SampleKey
from odvae.cache.embed import embed_captions
from odvae.cli import main
from odvae.data import parquet
from odvae.data.files import list_folder
from odvae.data.listing import list_entries
from odvae.data.manifests import read_manifest, read_rows
from odvae.data.video.reader import VideoError
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"  # where str.splitlines cuts, and JSON need not


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of 5 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for k in range(6):
        write_noise(folder / f"clip_{k}.mp4", k, size=(24, 64))
    return folder


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLODVAE:
    return tiny_vae()


def captions(source: Path | str, *columns: str) -> dict[str, tuple[str, ...]]:
    return {entry.ref.name: entry.captions for entry in list_entries(source, columns).entries}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "l.jsonl", {"path": "a.mp4", "caption": SEPARATORS}, {"path": "b.mp4"})
    assert [(row.path, row.captions) for row in read_rows(path)] == [("a.mp4", (SEPARATORS,)), ("b.mp4", None)]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(path)[0].captions == (SEPARATORS,) and len(read_rows(path)) == 2
    (tmp_path / "l.csv").write_text(f'path,caption\na.mp4,"{SEPARATORS}"\n', newline="")
    assert read_rows(tmp_path / "l.csv")[0].captions == (SEPARATORS,)


def test_captions_are_text_or_a_list_of_texts(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [{"path": "a.mp4", "caption": value} for value in (["one", "two"], nan, None, [], "", "['a', 'b']")]
    expected = [("one", "two"), None, None, None, ("",), ("['a', 'b']",)]
    assert [row.captions for row in read_rows(jsonl(tmp_path / "l.jsonl", *rows))] == expected
    table = {"path": ["a.mp4"] * 3, "caption": [["one", "two"], None, []]}
    pq.write_table(pa.table(table), tmp_path / "l.parquet")
    assert [row.captions for row in read_rows(tmp_path / "l.parquet")] == [("one", "two"), None, None]
    pq.write_table(pa.table({"path": ["a.mp4"] * 2, "caption": [nan, nan], "end": [nan, 2.0]}), tmp_path / "l.parquet")
    assert [(row.captions, row.end) for row in read_rows(tmp_path / "l.parquet")] == [(None, float("inf")), (None, 2.0)]


@pytest.mark.parametrize(("row", "message"), [
    ({"path": "a.mp4", "caption": {"en": "x"}}, 'row 2: the caption is {"en": "x"}; it must be text'),
    ({"path": "a.mp4", "caption": False}, "row 2: the caption is false"),
    ({"path": "a.mp4", "caption": 7}, "row 2: the caption is 7"),
    ({"path": "a.mp4", "caption": ["a", None]}, r'row 2: the caption is \["a", null\]'),
    ({"path": "a.mp4", "caption": ["a", float("nan")]}, "row 2: the caption is"),
    ({"path": {"bytes": "x"}}, 'row 2: the path is {"bytes": "x"}, and must be text'),
    ({"path": float("nan")}, "row 2 has no `path`"),
    ({"path": "a.mp4", "start": True}, "row 2: start is True"),
    (["a.mp4"], "row 2 is not a JSON object"),
])
def test_invalid_rows_are_refused_by_number(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(jsonl(tmp_path / "l.jsonl", {"path": "good.mp4"}, row))


def test_half_a_surrogate_pair_is_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"path": "a.mp4", "caption": "cut \\ud83d"}\n')
    with pytest.raises(UserError, match=r"row 1: the caption 'cut \\ud83d' has half of a surrogate pair"):
        read_rows(tmp_path / "l.jsonl")


def test_csv_with_quotes_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    path.write_text("\ufeffpath , caption ,width\na.mp4,one,64\n\nb.mp4\nc.mp4,\n")
    assert [(row.path, row.captions) for row in read_rows(path)] == [
        ("a.mp4", ("one",)), ("b.mp4", None), ("c.mp4", None)]
    path.write_text("path,caption\na.mp4,one\nb.mp4,a dog, running\n")
    with pytest.raises(UserError, match="row 2 has 3 cells and the header has 2; quote text that contains commas"):
        read_rows(path)
    path.write_text("path,caption, caption\na.mp4,one,two\n")
    with pytest.raises(UserError, match="several columns named 'caption'"):
        read_rows(path)


def test_column_names_can_be_mapped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "l.jsonl", {"video": "a.mp4", "text": "one", "from": 1.5}, {"video": "b.mp4", "text": None})
    with pytest.raises(UserError, match=r"`path` or `file_name`; its columns are video, text, from\. .*--columns"):
        read_rows(path)
    with pytest.raises(UserError, match="no column `cap`; its columns are video, text, from"):
        read_rows(path, ["path=video", "caption=cap"])
    rows = read_rows(path, ["path=video", "caption=text", "start=from"])
    assert [(row.path, row.captions, row.start) for row in rows] == [("a.mp4", ("one",), 1.5), ("b.mp4", None, 0.0)]
    assert [one.path.name for one in read_manifest(path, ["path=video"])] == ["a.mp4", "b.mp4"]
    assert "has no column `caption`, and its columns are video, text, from" in caplog.text
    for wrong in ("path", "path=", "width=w"):
        with pytest.raises(UserError, match="must be one of path, caption, start, end"):
            read_rows(path, [wrong])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_names_the_files_of_a_folder(kind: str, videos: Path, tmp_path: Path) -> None:
    """The layout of Hugging Face's videofolder, with one list a split; here and at a URL."""
    folder = tmp_path / "set"
    for split, some in (("train", (0, 1, 2)), ("test", (3, 4))):
        (folder / split / "clips").mkdir(parents=True)
        for k in some:
            shutil.copy(videos / f"clip_{k}.mp4", folder / split / "clips")
        rows = [{"file_name": f"clips/clip_{k}.mp4", "caption": f"the {k}."} for k in some if k != 2]
        path = folder / split / f"metadata.{kind}"
        if kind == "csv":
            path.write_text("file_name,caption\n" + "".join(f"{row['file_name']},{row['caption']}\n" for row in rows))
        elif kind == "jsonl":
            jsonl(path, *rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    (folder / "test/notes.md").touch()
    expected = {f"{split}/clips/clip_{k}.mp4": (f"the {k}.",) for split, k in (
        ("train", 0), ("train", 1), ("test", 3), ("test", 4))}
    assert captions(folder) == expected
    left_out = {".mp4 (not in the metadata)": 1, ".md": 1}
    assert list_entries(folder).left_out == left_out
    assert {one.path.relative_to(folder).as_posix() for one in list_folder(folder)} == set(expected)
    fsspec.filesystem("memory").put(str(folder), f"/hub-{kind}", recursive=True)
    there = list_entries(f"memory://hub-{kind}")
    assert {entry.ref.name: entry.captions for entry in there.entries} == expected and there.left_out == left_out
    with there.entries[0].ref.open_local() as local:
        assert local.read_bytes() == (videos / "clip_3.mp4").read_bytes()  # test/ before train/


def write_parquet(path: Path, videos: Path, rows_a_group: int | None = None) -> Path:
    """As `datasets` writes a column of videos: {bytes, path}; of clip 4 the path alone, of clip 5 the bytes alone."""
    rows = [{"video": {"bytes": (videos / f"clip_{k}.mp4").read_bytes() if k != 4 else None,
                       "path": None if k == 5 else f"clip_{k}.mp4"}, "text": [f"the {k}.", "a clip"]} for k in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_a_group)
    return path


@pytest.mark.parametrize("rows_a_group", [None, 2])
def test_videos_inside_a_parquet_file(rows_a_group: int | None, videos: Path, tmp_path: Path) -> None:
    shutil.copy(videos / "clip_4.mp4", tmp_path)
    path = write_parquet(tmp_path / "data-00000.parquet", videos, rows_a_group)
    with pytest.raises(UserError, match=r"its columns are video \{bytes, path\}, text"):
        list_entries(path)
    columns = ["path=video", "caption=text"]
    entries = list_entries(path, columns).entries
    assert [entry.ref.name for entry in entries] == [*(f"data-00000.parquet::clip_{k}.mp4" for k in range(4)),
                                                       "clip_4.mp4", "data-00000.parquet::row-5"]
    assert [entry.captions for entry in entries] == [(f"the {k}.", "a clip") for k in range(6)]
    fsspec.filesystem("memory").put(str(path), "/data/a.parquet")
    remote = list_entries("memory://data", columns).entries  # a folder of nothing but Parquet files
    for k in (2, 0, 5, 1, 3, 3):
        for entry in (entries[k], remote[k]):
            with entry.ref.open_local() as local:
                assert local.read_bytes() == (videos / f"clip_{k}.mp4").read_bytes()
    with pytest.raises(UserError, match="holds videos as bytes, which only `odvae cache build` reads"):
        read_manifest(path, columns)
    pq.write_table(pa.table({"file": [(videos / "clip_1.mp4").read_bytes()]}), tmp_path / "plain.parquet")
    (plain,) = list_entries(tmp_path / "plain.parquet", ["path=file"]).entries
    with plain.ref.open_local() as local:
        assert local.read_bytes() == (videos / "clip_1.mp4").read_bytes()


def test_a_parquet_file_whose_disk_failed_once_is_read_again(videos: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(videos / "clip_4.mp4", tmp_path)
    entries = list_entries(write_parquet(tmp_path / "a.parquet", videos), ["path=video", "caption=text"]).entries
    real, failures = parquet._batches, [OSError(errno.EIO, "Input/output error")]

    def failing(*arguments: Any) -> Any:
        for batch in real(*arguments):
            if failures:
                raise failures.pop()
            yield batch

    monkeypatch.setattr(parquet, "_batches", failing)
    with pytest.raises(VideoError, match="cannot be read") as caught:
        entries[2].ref.open_local().__enter__()
    assert caught.value.kind == "unavailable"
    for k in (2, 3):
        with entries[k].ref.open_local() as local:
            assert local.read_bytes() == (videos / f"clip_{k}.mp4").read_bytes()


def test_a_parquet_file_that_changed_since_it_was_listed_is_reported(videos: Path, tmp_path: Path) -> None:
    """A build may go on for days."""
    shutil.copy(videos / "clip_4.mp4", tmp_path)
    path = write_parquet(tmp_path / "a.parquet", videos)
    entries = list_entries(path, ["path=video", "caption=text"]).entries
    rows = pq.read_table(path).to_pylist()
    rows[1]["video"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows[:3]), path)
    for k, reason in ((1, "the row no longer holds a video"), (3, "the row that held the video no longer exists")):
        with pytest.raises(VideoError, match=reason), entries[k].ref.open_local():
            pass


def test_a_remote_list_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot reach memory://gone/list\.csv: .*\. Check the address"):
        list_entries("memory://gone/list.csv")


def test_a_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    """Of a row group of 16 MB the first row is read, and what lies behind it is not."""
    data = [np.random.default_rng(k).bytes(2**19) for k in range(32)]
    pq.write_table(pa.table({"video": data}), tmp_path / "a.parquet", write_batch_size=1)
    opened = list[Counted]()

    def counted(path: str) -> Counted:
        opened.append(Counted(path))
        return opened[-1]

    before = pa.total_allocated_bytes()
    for row in (0, 1, 2):
        assert parquet.read_cell(counted, str(tmp_path / "a.parquet"), "stamp", "video", row) == data[row]
        assert sum(file.count for file in opened) + pa.total_allocated_bytes() - before < 2**23
    assert len(opened) == 1


class Counted(io.FileIO):
    """A file that counts the bytes that are read from it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.count += len(found)
        return found


def test_two_columns_of_videos_are_two_sets(videos: Path, vae: AutoencoderKLODVAE, tmp_path: Path) -> None:
    one, two = ((videos / f"clip_{k}.mp4").read_bytes() for k in (1, 2))
    pq.write_table(pa.table({"left": [one], "right": [two], "text": ["a"]}), tmp_path / "a.parquet")
    for column, clips in (("left", 1), ("right", 2)):
        summary = build_cache(tmp_path / "a.parquet", tmp_path / "cache", vae,
                              columns=(f"path={column}", "caption=text"), **SHAPE)
        assert (summary.done, len(LatentCache(tmp_path / "cache").ids)) == (1, clips)


def test_several_captions_from_list_to_training(videos: Path, vae: AutoencoderKLODVAE, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Of videos in a Parquet file: the same clips as of the files, all captions kept, embedded, found, and drawn."""
    shutil.copy(videos / "clip_4.mp4", tmp_path)
    path, cache = write_parquet(tmp_path / "all.parquet", videos), tmp_path / "cache"
    vae.save_pretrained(tmp_path / "vae")
    assert main(["cache", "build", str(path), str(cache), "--columns", "path=video", "caption=text", "--frames", "5",
                 "--size", "16", "16", "--workers", "1", "--vae", str(tmp_path / "vae")]) == 0
    build_cache(videos, tmp_path / "files", vae, **SHAPE)
    opened = LatentCache(cache, vae)
    assert sorted(opened.ids) == sorted(LatentCache(tmp_path / "files").ids)
    every = sorted({caption for some in opened.iter_captions() for caption in some.to_pylist()})
    assert every == sorted([*(f"the {k}." for k in range(6)), "a clip"]) and sorted(opened.captions) == every[1:]
    capsys.readouterr()
    assert main(["cache", "query", str(cache), "select count(*) as n from clips where caption like '%a clip%'"]) == 0
    assert capsys.readouterr().out.split() == ["n", "6"]
    assert main(["cache", "query", str(cache), "select * from clips", "--out", str(tmp_path / "all.csv")]) == 0
    assert '[""the 3."", ""a clip""]' in (tmp_path / "all.csv").read_text()
    assert main(["cache", "stats", str(cache)]) == 0 and "7 captions" in capsys.readouterr().out
    assert main(["cache", "show", str(cache), str(tmp_path / "s.png"), "--vae", str(tmp_path / "vae")]) == 0
    assert main(["cache", "export", str(cache), str(tmp_path / "out")]) == 0
    row = json.loads((tmp_path / f"out/{opened.ids[0]}.json").read_text())
    assert row["captions"] == [opened.captions[0], "a clip"]
    assert embed_captions(cache, Lengths(), every)[1] == 7

    def draw(data: LatentDataset) -> list[list[str]]:
        return [[data[SampleKey(clip, epoch)]["caption"] for epoch in range(60)] for clip in range(6)]

    drawn = draw(LatentDataset(opened, seed=3))
    assert drawn == draw(LatentDataset(opened, seed=3))
    for clip, some in enumerate(drawn):
        assert set(some) == {opened.captions[clip], "a clip"} and 15 <= Counter(some)["a clip"] <= 45

    rows = [{"path": f"clip_{k}.mp4", "caption": f"new {k}"} for k in range(6)]  # captions change, nothing is encoded
    for k in range(6):
        shutil.copy(videos / f"clip_{k}.mp4", tmp_path)
    assert build_cache(jsonl(tmp_path / "new.jsonl", *rows), cache, vae, **SHAPE).done == 0
    assert sorted(LatentCache(cache).captions) == [f"new {k}" for k in range(6)]


class Lengths:
    """A text encoder: a vector that holds the caption's length."""

    dim, fingerprint = 1, "lengths" * 8

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[[float(len(one))]] for one in captions]), torch.ones(len(captions), 1, dtype=torch.bool)
