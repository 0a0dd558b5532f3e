"""A cache loses nothing: not by `gc`, not by a `merge` that is killed, not by names or file systems of another kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_cache import SHAPE, read_files, tiny_vae, write_noise, write_noise_photo

from odvae.cache import LatentCache, build_cache, mapped_shard, text
from odvae.cache.build.decode_pool import DecodePool
from odvae.cache.embed import embed_captions
from odvae.cache.maintain.garbage import collect_garbage
from odvae.cache.maintain.merge import merge
from odvae.cache.maintain.rejects import read_rejects
from odvae.cache.maintain.verify import verify
from odvae.cache.text import TextStore
from odvae.cli import main
from odvae.data import sources
from odvae.data.sources import MediaRef
from odvae.data.video.reader import VideoError
from odvae.utils import files
from odvae.utils.errors import UserError
from odvae.utils.storage import LocalStorage

SETTINGS = SHAPE | {"psnr_clips": 0, "shard_clips": 3}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos of 5 frames, the last one in a folder, and a photo."""
    folder = tmp_path_factory.mktemp("videos")
    for k in range(7):
        write_noise(folder / ("sub" if k == 6 else ".") / f"clip_{k}.mp4", k)
    write_noise_photo(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def built(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("built") / "cache"
    build_cache(videos, cache, tiny_vae(), **SETTINGS)
    return cache


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache"))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def tensors(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in read_files(cache).items() if name.endswith(".safetensors")}


DOUBTS: dict[str, Callable[[Path], object]] = {
    "videos that are being copied": lambda source: [half(path) for path in source.rglob("*.mp4")],
    "a photo that is being copied": lambda source: half(source / "photo.png"),
    "captions in another encoding": lambda source: [path.with_suffix(".txt").write_bytes("café".encode("latin-1"))
                                                    for path in source.rglob("*.mp4")],
    "other names": lambda source: [path.rename(path.with_name(f"new_{path.name}")) for path in source.rglob("*.*")],
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_gc_removes_nothing_that_is_listed(source: Path, cache: Path, doubt: str) -> None:
    before = tensors(cache)
    DOUBTS[doubt](source)
    found = collect_garbage(cache, [str(source)])
    assert (found.clips, found.files) == (0, {}) and tensors(cache) == before
    assert collect_garbage(cache, [str(source / "sub"), str(source)]).clips == 0  # as that names them otherwise
    kept = {"videos that are being copied": 7, "a photo that is being copied": 1}.get(doubt, 0)
    assert len(found.kept) == kept == sum("keep" in line for line in found.lines(20))


def test_unreadable_captions_do_not_replace_stored_ones(source: Path, cache: Path) -> None:
    before = LatentCache(cache).captions
    for path in source.rglob("*.mp4"):
        path.with_suffix(".txt").write_bytes("café".encode("latin-1"))
    summary = build_cache(source, cache, tiny_vae(), **SETTINGS)
    assert summary.done == 0 and LatentCache(cache).captions == before
    for path in source.rglob("*.mp4"):
        path.with_suffix(".txt").write_text("café", encoding="utf-8")
    build_cache(source, cache, tiny_vae(), **SETTINGS)
    assert set(LatentCache(cache).captions) > {"café"}


@pytest.mark.parametrize("what", ["sub", "clip_1.mp4", "clip_2.mp4"])
def test_gc_keeps_what_lies_behind_a_link_that_leads_nowhere(source: Path, cache: Path, tmp_path: Path,
                                                            what: str) -> None:
    (source / what).rename(tmp_path / "away")  # as a disk that is not mounted
    (source / what).symlink_to(tmp_path / "away")
    (tmp_path / "away").rename(tmp_path / "gone")
    found = collect_garbage(cache, [str(source)], force=False)
    assert found.clips == 0 and list(found.kept) == ["sub/clip_6.mp4" if what == "sub" else what]
    (source / what).unlink()
    assert collect_garbage(cache, [str(source)], force=False).clips == 1


def test_gc_keeps_what_lies_in_a_folder_that_cannot_be_listed(source: Path, cache: Path) -> None:
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        found = collect_garbage(cache, [str(source)], force=False)
    assert found.clips == 0 and list(found.kept) == ["sub/clip_6.mp4"]
    assert "Permission denied" in found.kept["sub/clip_6.mp4"]


def test_gc_in_a_cache_of_files_that_are_cut_off(tmp_path: Path) -> None:
    source = tmp_path / "source"
    whole = write_noise(tmp_path / "whole.mp4", 0, 40).read_bytes()
    source.mkdir()
    (source / "cut.mp4").write_bytes(whole[:len(whole) * 3 // 5])
    write_noise(source / "good.mp4", 1)
    built = build_cache(source, tmp_path / "cache", tiny_vae(), keep_truncated=True, **SETTINGS)
    assert built.done > 1
    (source / "cut.mp4").rename(source / "renamed.mp4")
    for path in (tmp_path / "cache").rglob("files.parquet"):
        path.unlink()
    assert collect_garbage(tmp_path / "cache", [str(source)]).clips == 0
    assert build_cache(source, tmp_path / "cache", tiny_vae(), keep_truncated=True, **SETTINGS).done == 0


@pytest.mark.parametrize("fault", ["full", "dangling"])
def test_gc_of_tars_that_cannot_be_read_now(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            fault: str) -> None:
    source, cache = tmp_path / "tars", tmp_path / "cache"
    source.mkdir()
    for k in range(2):
        with tarfile.open(source / f"{k}.tar", "w") as tar:
            for path in sorted(videos.glob("*.mp4"))[3 * k:3 * k + 3]:
                tar.add(path, path.name)
    assert build_cache(source, cache, tiny_vae(), **SETTINGS).done == 6
    for path in cache.rglob("files.parquet"):
        path.unlink()
    if fault == "full":
        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def probe(self: DecodePool, ref: MediaRef, **_: Any) -> Any:
            raise VideoError(f"{ref} cannot be read", "free some space", "disk full")

        monkeypatch.setattr(DecodePool, "probe", probe)
        monkeypatch.setattr(sources, "_copy", full)
        expected = 6
    else:
        (source / "1.tar").unlink()
        (source / "1.tar").symlink_to(tmp_path / "nothing")
        expected = 3
    found = collect_garbage(cache, [str(source)])
    assert found.clips == 0 and len(found.kept) == expected and len(LatentCache(cache)) == 6
    # Of a file that has another name besides nothing is known.
    (source / "0.tar").rename(source / "new.tar")
    if fault == "full":
        with pytest.raises(UserError, match=r"(?s)match no clip by name .*new.tar.*nothing was removed"):
            collect_garbage(cache, [str(source)], force=False)
        assert len(LatentCache(cache)) == 6


def test_gc_removes_replaced_files_and_needs_yes_for_many(source: Path, cache: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    write_noise(source / "clip_1.mp4", 100)  # another one under the old name, whole
    (source / "sub/clip_6.mp4").unlink()
    before = tensors(cache)
    command = ["cache", "gc", str(cache), str(source)]
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "remove: clip_1.mp4 (1 clips)" in printed and "remove: sub/clip_6.mp4 (1 clips)" in printed
    assert "2 clips would" in printed
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "2 of 8 clips would be removed, more than 10%" in printed and "--yes" in printed
    assert "remove: sub/clip_6.mp4" in printed
    assert tensors(cache) == before
    assert main([*command, "--max-share", "0.25"]) == 0 and len(LatentCache(cache)) == 6
    (source / "clip_2.mp4").unlink()
    assert main([*command, "--yes"]) == 0 and len(LatentCache(cache)) == 5
    assert not verify(cache).faults and not (cache / "work").exists()


class Killed(BaseException):
    pass


def test_a_killed_merge_is_no_cache_and_resumes(source: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "clip_1.mp4", other / "same.mp4")
    for k in range(4):
        write_noise(other / f"new_{k}.mp4", 50 + k)
    build_cache(other, tmp_path / "second", tiny_vae(), **SETTINGS)
    embed_captions(cache, Letters(), ["red", "blue"])
    caches, out = [cache, tmp_path / "second"], tmp_path / "out"
    assert merge(caches, tmp_path / "whole") == (12, 1)
    write, kills = LocalStorage.write, 0
    with pytest.MonkeyPatch.context() as patch:
        while True:
            left = iter([True] * (2 + kills % 2))  # its mark, tensors, and each second time what commits them
            assert kills < 50

            def killed(self: LocalStorage, name: str, data: Any, left: Any = left) -> None:
                if not next(left, False):
                    raise Killed
                write(self, name, data)

            patch.setattr(LocalStorage, "write", killed)
            try:
                assert merge(caches, out) == (12, 1)
                break
            except Killed:
                kills += 1
            patch.setattr(LocalStorage, "write", write)
            for action, words in ((lambda: LatentCache(out), "an unfinished merge of caches"),
                                  (lambda: build_cache(source, out, tiny_vae(), **SETTINGS), "an unfinished merge"),
                                  (lambda: merge(caches[::-1], out), "holds an interrupted merge of other caches")):
                with pytest.raises(UserError, match=words):
                    action()
    assert kills > 8 and read_files(out) == read_files(tmp_path / "whole")
    with pytest.raises(UserError, match="already exists"):
        merge(caches, out)


@pytest.mark.parametrize("change", ["grown", "collected", "captions"])
def test_a_resumed_merge_has_the_current_sources(source: Path, cache: Path, tmp_path: Path,
                                                                 change: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source / "clip_1.mp4", other / "same.mp4")
    write_noise(other / "new.mp4", 50)
    build_cache(other, tmp_path / "second", tiny_vae(), **SETTINGS)
    embed_captions(tmp_path / "second", Letters(), ["red"])
    caches, out = [tmp_path / "second", cache], tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("odvae.cache.maintain.merge.measure", lambda *_: (_ for _ in ()).throw(Killed))
        merge(caches, out)
    if change == "grown":  # by a clip that the other one gave
        shutil.copy(source / "clip_2.mp4", other / "twice.mp4")
    elif change == "collected":
        (other / "new.mp4").unlink()
    else:
        (other / "new.txt").write_text("another caption")
    if change == "collected":
        assert collect_garbage(tmp_path / "second", [str(other)]).clips == 1
        shutil.rmtree(tmp_path / "second/text")
    else:
        build_cache(other, tmp_path / "second", tiny_vae(), **SETTINGS)
    found = merge(caches, out)
    assert found == merge(caches, tmp_path / "whole") and read_files(out) == read_files(tmp_path / "whole")
    assert not verify(out).faults


class Letters:
    """A text encoder: a vector a letter."""

    dim, fingerprint = 1, "letters".ljust(64, "0")

    def encode(self, captions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, captions))
        mask = torch.arange(length) < torch.tensor([len(caption) for caption in captions])[:, None]
        return torch.ones(len(captions), length, 1), mask


def test_truncated_tensors_are_detected(source: Path, cache: Path, tmp_path: Path) -> None:
    store, _ = embed_captions(cache, Letters(), ["red", "blue"])
    for victim, actions in (
            (next(cache.glob("partitions/00000/*.safetensors")), [
                lambda: LatentCache(cache), lambda: build_cache(source, cache, tiny_vae(), **SETTINGS),
                lambda: collect_garbage(cache, [str(source)]), lambda: merge([cache], tmp_path / "merged")]),
            (next(store.folder.glob("*.safetensors")), [
                lambda: TextStore(store.folder), lambda: merge([cache], tmp_path / "merged")])):
        whole = victim.read_bytes()
        for damaged in (whole[:-1], b"", None):
            victim.write_bytes(damaged) if damaged is not None else victim.unlink()
            for action in actions:
                with pytest.raises(UserError, match=f"{victim.name} is (damaged|missing)"):
                    action()
        victim.write_bytes(whole)
    assert merge([cache], tmp_path / "merged") == (8, 0)  # goes on


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_transient_errors_are_not_reported_as_damage(source: Path, cache: Path, number: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is advised to delete a shard whose disk fails for a moment, or that belongs to somebody else."""
    def failing(real: Any, ending: str) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).endswith(ending):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    store, _ = embed_captions(cache, Letters(), ["red", "blue"])
    opened, before = LatentCache(cache), read_files(cache)
    messages = []
    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", failing(pq.read_table, ".parquet"))
        patch.setattr("odvae.utils.storage.open", failing(open, ".parquet"), raising=False)
        messages += verify(cache).faults
        for action in (lambda: LatentCache(cache), lambda: collect_garbage(cache, [str(source / "sub")]),
                       lambda: build_cache(source, cache, tiny_vae(), **SETTINGS), lambda: TextStore(store.folder)):
            with pytest.raises(UserError) as caught:
                action()
            messages.append(str(caught.value))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(Path.read_bytes, ".safetensors"))
        for module in (mapped_shard, text):
            patch.setattr(module, "open", failing(open, ".safetensors"), raising=False)
        messages += verify(cache).faults
        for action in (lambda: opened.entry(0), lambda: store.embedding("red")):
            with pytest.raises(UserError) as caught:
                action()
            messages.append(str(caught.value))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing(os.scandir, "partitions"))
        with pytest.raises(OSError, match="partitions"):
            collect_garbage(cache, [str(source / "sub")])
    assert len(messages) >= 12
    for one in messages:
        assert "the file itself may be intact" in one and os.strerror(number) in one and "delete" not in one
    after = read_files(cache)
    assert all(after[name] == data for name, data in before.items() if not name.endswith("files.parquet"))
    assert not verify(cache).faults


def test_errors_name_what_the_file_system_lacks(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refuse(number: int) -> Callable[..., Any]:
        def refused(*args: Any, **_: Any) -> Any:
            raise OSError(number, os.strerror(number), str(args[0]))

        return refused

    tiny_vae().save_pretrained(tmp_path / "vae")
    command = ["cache", "build", str(source), str(cache), "--vae", str(tmp_path / "vae"), "--frames", "5", "--size",
               "16", "16", "--workers", "1"]
    for number, words in ((errno.EROFS, "read-only file system; choose a writable path"),
                          (errno.EACCES, "permission denied; choose another path, or get the permission")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refuse(number))
            for one in (command, ["cache", "gc", str(cache), str(source)]):
                assert main(one) == 2
                printed = capsys.readouterr().err
                assert words in printed and str(cache / "work") in printed
            assert main(["cache", "stats", str(cache)]) == 0  # to read it nothing is written
    fsync = os.fsync
    for number in (errno.ENOSYS, errno.EPERM, errno.EINVAL):  # of a folder
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", lambda descriptor, number=number: refuse(number)("") if os.path.isdir(
                f"/proc/self/fd/{descriptor}") else fsync(descriptor))
            assert main(command) == 0


def test_a_cache_that_cannot_be_written_serves_captions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed_captions(cache, Letters(), ["red", "blue"])
    monkeypatch.setattr(Path, "mkdir", None)
    assert embed_captions(cache, Letters(), ["blue"])[1] == 0


def test_damaged_rejects_are_written_again(source: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "partitions/00000/rejects.parquet").touch()
    assert main(["cache", "stats", str(cache)]) == 0
    assert main(["cache", "query", str(cache), "select count(*) from rejects"]) == 0
    (source / "bad.mp4").write_text("no video")
    build_cache(source, cache, tiny_vae(), **SETTINGS)
    assert len(read_rejects(cache)) == 1


def test_names_that_are_not_utf_8(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r"""In a folder, a list and a tar. An index has \xNN for each byte that is not UTF-8."""
    def raw(name: bytes) -> str:
        return os.fsdecode(os.fsencode(tmp_path) + b"/" + name)

    tiny_vae().save_pretrained(tmp_path / "vae")
    Path(raw(b"d\xe9j\xe0")).mkdir()
    shutil.copy(videos / "clip_1.mp4", raw(b"d\xe9j\xe0/caf\xe9_noir.mp4"))
    shutil.copy(videos / "photo.png", raw(b"d\xe9j\xe0/\xfc.png"))
    Path(raw(b"d\xe9j\xe0/bad\xe9.mp4")).write_text("no video")
    Path(raw(b"list.jsonl")).write_text(json.dumps({"path": os.fsdecode(b"d\xe9j\xe0/caf\xe9_noir.mp4")}) + "\n")
    Path(raw(b"tars")).mkdir()
    with tarfile.open(raw(b"tars/a\xe9.tar"), "w") as tar:
        tar.add(videos / "clip_1.mp4", os.fsdecode(b"caf\xe9_noir.mp4"))
    names = {b"d\xe9j\xe0": r"caf\xe9_noir.mp4", b"list.jsonl": r"d\xe9j\xe0/caf\xe9_noir.mp4",
             b"tars": r"a\xe9.tar::caf\xe9_noir.mp4"}
    for number, (given, name) in enumerate(names.items()):
        cache = tmp_path / f"cache_{number}"
        assert main(["cache", "build", raw(given), str(cache), "--vae", str(tmp_path / "vae"), "--frames", "5",
                     "--size", "16", "16", "--workers", "1"]) == 0
        rows = {row["path"]: row["captions"] for row in LatentCache(cache).index.to_pylist()}
        assert rows.pop(name) == [r"caf\xe9 noir"]
        assert rows == ({r"\xfc.png": [r"\xfc"]} if number == 0 else {})
        assert build_cache(raw(given), cache, tiny_vae(), frames=[5], sizes=[(16, 16)], workers=1).done == 0
        assert main(["cache", "gc", str(cache), raw(given)]) == 0 and not verify(cache).faults
    assert r"set aside: " in (printed := capsys.readouterr().out) and r"bad\xe9.mp4" in printed
    assert [row["path"] for row in read_rejects(tmp_path / "cache_0").to_pylist()] == [r"bad\xe9.mp4"]
