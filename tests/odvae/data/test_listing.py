"""Which files a folder holds, with which captions, and what is left out of it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from odvae.data.files import find_videos, format_left_out, list_folder, list_videos, name_to_caption, walk
from odvae.data.listing import list_entries
from odvae.utils.errors import UserError
from odvae.utils.files import path_text


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def captions(source: Path) -> dict[str, tuple[tuple[str, ...], bool]]:
    return {entry.ref.name: (entry.captions, entry.caption_from_name) for entry in list_entries(source).entries}


def test_listing(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "A.MKV", "sub/c.webm", "photo.JPG", "notes.txt", ".hidden.mp4", ".trash/d.mp4")
    assert [p.relative_to(tmp_path).as_posix() for p in list_videos(tmp_path)] == ["A.MKV", "b.mp4", "sub/c.webm"]
    assert len(list_videos(tmp_path, images=True)) == 4
    shades = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 200)]
    for name in ("moves.webp", "moves.png"):
        shades[0].save(tmp_path / name, save_all=True, append_images=shades[1:], duration=100)
        shades[0].save(tmp_path / f"still-{name}")
    assert [path.name for path in list_videos(tmp_path)][-3:] == ["moves.png", "moves.webp", "c.webm"]


def test_folders_without_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        list_videos(tmp_path / "gone")
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match="is a file"):
        list_videos(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"holds no videos \(1 other files in it\); expected \.mp4 .*\.mkv"):
        list_videos(tmp_path)


def test_files_left_out_are_counted_by_extension(tmp_path: Path) -> None:
    """Not the .txt and .json that say something of a video, nor hidden files."""
    touch(tmp_path, "a.mp4", "a.txt", "a.json", "b.mp4", "b.mp4.json", "sub/c.PNG", "sub/c.TXT", "x.heic", "y.HEIC",
          "z.avif", "t.tiff", "u.mts", "v.xyz", "README", "alone.txt", ".hidden.mts")
    reported = {".heic": 2, ".avif": 1, ".tiff": 1, ".mts": 1, ".xyz": 1, "no extension": 1, ".txt": 1}
    assert list_entries(tmp_path).left_out == reported
    assert find_videos(tmp_path).left_out == reported | {".png": 1, ".txt": 2}
    assert format_left_out(Counter({".mts": 1, ".heic": 2, ".avif": 1})) == [
        "left out, by extension: 2 .heic, 1 .avif, 1 .mts"]
    assert format_left_out(Counter()) == []


def test_linked_folders_are_followed_each_once(tmp_path: Path) -> None:
    """A folder has its own name where it has one here, a loop ends, and a link that leads nowhere is seen."""
    touch(tmp_path, "in/real/a.mp4", "in/z/b.mp4", "away/deep/c.mp4", "away/d.mp4")
    folder = tmp_path / "in"
    for link, target in (("away", tmp_path / "away"), ("again", tmp_path / "away/deep"), ("a-first", folder / "z"),
                         ("real/up", folder), ("self", folder / "self"), ("gone.mp4", tmp_path / "nowhere"),
                         ("one.mp4", tmp_path / "away/d.mp4")):
        (folder / link).symlink_to(target)
    (tmp_path / "away/back").symlink_to(tmp_path / "away")
    assert walk(folder).names == ["again/c.mp4", "away/d.mp4", "one.mp4", "real/a.mp4", "z/b.mp4"]
    assert [one.path.relative_to(folder).as_posix() for one in list_folder(folder)] == walk(folder).names
    assert sorted(ref.name for ref, _ in list_entries(folder).set_aside) == ["gone.mp4", "self"]


def test_unreadable_entries_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "locked/b.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_entries(tmp_path)
    assert [entry.ref.name for entry in listing.entries] == ["a.mp4"]
    assert sorted(ref.name for ref, _ in listing.set_aside) == ["locked", "pipe.mp4"]
    assert {one.reason.split(" cannot be read ")[1] for one in find_videos(tmp_path).set_aside} == {
        "(Permission denied)", "(neither a file nor a folder)"}


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9_noir.mp4"))
    path.touch()
    assert path_text(path.name) == r"caf\xe9_noir.mp4" and name_to_caption(path.stem) == r"caf\xe9 noir"
    (entry,) = list_entries(tmp_path).entries
    assert entry.ref.name == r"caf\xe9_noir.mp4" and entry.captions == (r"caf\xe9 noir",)
    with entry.ref.open_local() as local:
        assert local.is_file()
    assert list_videos(tmp_path) == [path]


def test_captions(tmp_path: Path) -> None:
    touch(tmp_path, "a_red-square__moving.mp4", "b.mp4", "c.mp4", "d.mp4")
    (tmp_path / "b.txt").write_bytes("\ufeff  ein Würfel \n".encode())
    (tmp_path / "c.TXT").write_text("capitals")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    assert captions(tmp_path) == {"a_red-square__moving.mp4": (("a red square moving",), True),
                                  "b.mp4": (("ein Würfel",), False), "c.mp4": (("capitals",), False),
                                  "d.mp4": (("d",), True)}
    (aside,) = list_entries(tmp_path).set_aside  # the caption, not the video
    assert aside[0].name == "d.mp4" and aside[1].kind == "caption" and "d.txt is not UTF-8" in str(aside[1])
    (tmp_path / "list.csv").write_text("path\nb.mp4\nc.mp4\nd.mp4\n")
    listed = captions(tmp_path / "list.csv")
    assert listed == {name: some for name, some in captions(tmp_path).items() if name in ("b.mp4", "c.mp4", "d.mp4")}


def test_folders_are_classes_where_all_files_lie_in_several(tmp_path: Path) -> None:
    def labels() -> dict[str, str]:
        return {name.rpartition("/")[2]: some[0] for name, (some, from_name) in captions(tmp_path).items()
                if not from_name}

    touch(tmp_path, "riding_a-bike/x1.mp4", "riding_a-bike/x2.mp4")
    assert labels() == {}  # one folder may as well be no class
    touch(tmp_path, "tennis/y.mp4")
    assert labels() == {"x1.mp4": "riding a bike", "x2.mp4": "riding a bike", "y.mp4": "tennis"}
    (tmp_path / "tennis/y.txt").write_bytes(b"\xff")
    assert labels()["y.mp4"] == "tennis"
    (tmp_path / "tennis/y.txt").write_text("a serve")
    assert labels()["y.mp4"] == "a serve"
    for other in ("tennis/indoor/z.mp4", "z.mp4"):  # deeper, or beside the folders: no classes
        touch(tmp_path, other)
        assert labels() == {"y.mp4": "a serve"}
        (tmp_path / other).unlink()
