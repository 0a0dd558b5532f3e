"""WebDataset tars: where captions come from, and what is said of those that cannot be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from odvae.data.listing import list_entries
from odvae.utils.errors import UserError


def write_tar(path: Path, **members: bytes) -> Path:
    """`clip_txt=b"..."` becomes the file clip.txt."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("sidecars", "captions"), [
    ({"a_txt": b" text \n", "a_json": b'{"caption": "json"}', "a_cls": b"3"}, ("text",)),
    ({"a_json": b'{"caption": [" one ", "two"], "text": "three"}', "a_cls": b"3"}, ("one", "two")),
    ({"a_json": b'{"caption": null, "text": "three"}', "a_cls": b"3"}, ("three",)),
    ({"a_json": b'{"width": 3}', "a_cls": b"3"}, ("3",)),
    ({"a_json": b'["no object"]', "a_cls": b"3"}, ("3",))])
def test_captions_come_from_txt_else_json_else_cls(sidecars: dict[str, bytes], captions: tuple[str, ...],
                                                  tmp_path: Path) -> None:
    (entry,) = list_entries(write_tar(tmp_path / "a.tar", a_mp4=b"video", **sidecars)).entries
    assert (entry.captions, entry.caption_from_name, entry.captions_unread) == (captions, False, False)


@pytest.mark.parametrize(("json", "reason"), [
    (b'{"caption": ', "a.json is not JSON"), (b'{"caption": 7}', "a.json: the caption is 7"),
    (b'{"caption": "caf\xe9"}', "a.json")])
def test_a_caption_that_cannot_be_read_is_reported_and_its_video_kept(json: bytes, reason: str, tmp_path: Path) -> None:
    listing = list_entries(write_tar(tmp_path / "a.tar", a_mp4=b"video", a_json=json))
    (entry,) = listing.entries
    assert (entry.captions, entry.captions_unread) == (("a",), True)
    ((_, error),) = listing.set_aside
    assert error.kind == "caption" and reason in error.reason and "until then a.tar::a.mp4 is captioned" in error.advice


def test_tars_without_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hold no videos or photos; expected .*\.mp4"):
        list_entries(write_tar(tmp_path / "a.tar", a_txt=b"a caption", b_flac=b"sound"))
