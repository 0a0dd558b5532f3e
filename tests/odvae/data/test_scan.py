"""A source is read once as a stream: each partition has what the whole listing has of it, whatever is spilled."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from waiting import TIMEOUT

from odvae.cache.partition import partition_of
from odvae.data import spill, tars
from odvae.data.entries import Listing
from odvae.data.listing import list_entries, scan_source
from odvae.data.manifests import read_rows
from odvae.data.spill import DistinctCount
from odvae.utils.errors import UserError


def write_folder(folder: Path) -> Path:
    """Class folders, captions of a name with capitals, sidecars, a name that is not UTF-8, and other files."""
    names = [f"kind_{k % 3}/{k}.mp4" for k in range(20)]
    names += [f"kind_0/{name}" for name in ("0.TXT", "3.mp4.txt", "98.mp4.txt", "3.mp4.mov", "99.txt", "x.flac")]
    names += ["kind_1/4.txt", "kind_2/2.mp4.json", "kind_2/5.json", "README"]
    for name in [*names, os.fsdecode(b"kind_1/caf\xe9.mp4")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {Path(name).stem!a}")
    (folder / "kind_1/7.txt").write_bytes(b"\xff")
    (folder / "kind_1/gone.mp4").symlink_to(folder / "nowhere")
    return folder


def write_list(folder: Path, kind: str) -> Path:
    """Spans, own captions, and a .txt."""
    rows = [{"path": f"kind_{k % 3}/{k}.mp4", "caption": None if k % 2 else [f"the {k}", "a clip"], "end": end}
            for end in (1.0, 2.0) for k in range(20)]
    path = write_folder(folder) / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for number in range(6):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in (f"{number}a.mp4", f"{number}a.json", f"{number}b.mp4", f"{number}b.txt", f"{number}.flac"):
                data = b'{"caption": "of json"}' if name.endswith("json") else name.encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "cut.tar").write_bytes((folder / "0.tar").read_bytes()[:700])
    (folder / "notes.md").touch()
    return folder


def make(kind: str, folder: Path) -> Path | str:
    if kind == "tars":
        return write_tars(folder)
    if kind in ("jsonl", "parquet"):
        return write_list(folder, kind)
    if kind == "metadata":
        return write_list(folder, "jsonl").rename(folder / "metadata.jsonl").parent
    if kind == "remote":
        (write_folder(folder) / "kind_1/gone.mp4").unlink()
        os.unlink(os.fsencode(folder) + b"/kind_1/caf\xe9.mp4")
        fsspec.filesystem("memory").put(str(folder), f"/scan-{folder.parent.name}", recursive=True)
        return f"memory://scan-{folder.parent.name}"
    return write_folder(folder)


@pytest.mark.parametrize("count", [1, 4, 1024])
@pytest.mark.parametrize("kind", ["folder", "remote", "jsonl", "parquet", "metadata", "tars"])
def test_partitions_hold_what_the_whole_listing_holds(kind: str, count: int, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(kind, tmp_path / "source")
    whole = list_entries(source)
    assert len(whole.entries) > 10 and whole.left_out if kind not in ("jsonl", "parquet") else whole.entries
    monkeypatch.setattr(spill, "BUFFER", 3)
    found, left_out = dict[int, Listing](), Counter[str]()
    with scan_source(source) as scanned:
        assert int(scanned.files) == len({entry.ref.name for entry in whole.entries})
        for number in range(count):
            found[number] = scanned.partition(number, count)
        left_out = scanned.left_out
    assert left_out == whole.left_out
    for number, listing in found.items():
        assert listing.entries == [one for one in whole.entries if partition_of(one.ref.name, count) == number]
        assert sorted((ref.name, str(error)) for ref, error in listing.set_aside) == sorted(
            (ref.name, str(error)) for ref, error in whole.set_aside if partition_of(ref.name, count) == number)


def test_what_belongs_to_other_parts_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, opened, open_path = write_tars(tmp_path / "source"), list[str](), tars.open_path

    def counted(path: str) -> object:
        opened.append(Path(path).name)
        return open_path(path)

    monkeypatch.setattr(tars, "open_path", counted)
    with scan_source(source, keep=lambda key: key % 2 == 1) as scanned:
        assert sorted(opened) == sorted(name for name in [*(f"{k}.tar" for k in range(6)), "cut.tar"]
                                        if partition_of(f"{name}::", 2) == 1) != []
        assert not scanned.partition(0, 2).entries and scanned.partition(1, 2).entries


def test_remote_files_are_asked_for_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory, barrier = fsspec.filesystem("memory"), threading.Barrier(4)
    for k in range(16):
        memory.pipe_file(f"/side/{k}.mp4", b"x")
    info = type(memory).info

    def met(self: object, path: str, **options: object) -> object:
        barrier.wait(TIMEOUT)  # passes only where four are under way
        return info(self, path, **options)

    (tmp_path / "list.csv").write_text("path\n" + "".join(f"memory://side/{k}.mp4\n" for k in range(16)))
    monkeypatch.setattr(type(memory), "info", met)
    assert all(entry.ref.version_tag for entry in list_entries(tmp_path / "list.csv").entries)


def test_columns_of_jsonl_may_come_late(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"file_name": "a.mp4"}\n{"file_name": "b.mp4", "caption": "b"}\n')
    assert [(row.path, row.captions) for row in read_rows(path)] == [("a.mp4", None), ("b.mp4", ("b",))]
    for rows, message in (('{"file_name": "a.mp4"}\n{"path": "b.mp4"}\n', "row 1 has no `path`"),
                          ('{"x": 1}\n{"path": "b.mp4"}\n', "row 1 has no `path`"),
                          ('{"x": 1}\n{"y": "b.mp4"}\n', "its columns are x, y")):
        path.write_text(rows)
        with pytest.raises(UserError, match=message):
            read_rows(path)


def test_distinct_names_are_counted_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SKETCH", 1024)
    for number, error in ((1000, 0.0), (20000, .1)):
        count = DistinctCount()
        for k in [*range(number), *range(number)]:
            count.add(f"{k}.mp4")
        assert abs(int(count) - number) <= error * number
