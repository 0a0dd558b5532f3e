"""Transient failures are retried, never recorded as faults of a file, and tried again by the next build."""

from __future__ import annotations

import errno
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import fsspec
import pytest
import torch
from fsspec.spec import AbstractFileSystem
from tiny_cache import SHAPE, tiny_vae

from odvae.cache import LatentCache, build_cache
from odvae.cache.build import decode_pool
from odvae.cache.build.decode_pool import DecodePool, probe_each
from odvae.cache.build.decode_worker import MediaInfo
from odvae.cache.build.executors.executor import Executor
from odvae.cache.build.probe import probe_files
from odvae.cache.build.settings import BuildSettings
from odvae.cache.build.shard_encoder import EncodeUnit
from odvae.cache.maintain.rejects import read_rejects
from odvae.cache.partition import read_partition
from odvae.cli import main
from odvae.data import entries, manifests, sources, tars
from odvae.data.failures import KINDS, Retry, retry_policy, to_video_error
from odvae.data.listing import list_entries
from odvae.data.sources import MediaRef
from odvae.data.video.reader import VideoError
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils import backoff
from odvae.utils.backoff import Backoff
from odvae.utils.errors import UserError
from odvae.utils.storage import open_storage

SETTINGS = SHAPE | {"psnr_clips": 0, "shard_clips": 3}
FLAKY = """
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem

class FlakyFileSystem(LocalFileSystem):
    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("flaky://")

    def _fail(self, path):
        down = Path(path).parent / "down"  # how many more requests fail
        left = int(down.read_text()) if down.exists() else 0
        if left:
            down.write_text(str(left - 1))
            raise RuntimeError("503 Slow Down")  # as many protocols, none of the system's errors

    def _open(self, path, *args, **options):
        self._fail(path)
        return super()._open(path, *args, **options)

    def info(self, path, **options):
        self._fail(self._strip_protocol(path))
        return super().info(self._strip_protocol(path), **options)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A remote store, in all processes: flaky://PATH. It fails as often as the file `down` beside a file says."""
    package = tmp_path_factory.mktemp("package")
    (package / "flaky-1.dist-info").mkdir(parents=True)
    (package / "flaky.py").write_text(FLAKY)
    (package / "flaky-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flaky\nVersion: 1\n")
    (package / "flaky-1.dist-info/entry_points.txt").write_text("[fsspec.specs]\nflaky = flaky.FlakyFileSystem\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(package)
        patch.setattr(decode_pool, "_fork_servers", [])  # a process that knows the store, too
        import flaky

        fsspec.register_implementation("flaky", flaky.FlakyFileSystem, clobber=True)
        yield
        decode_pool._fork_servers[0]._process.kill()
        del sys.modules["flaky"]


@pytest.fixture
def remote(source: Path, tmp_path: Path, store: None) -> Path:
    """A list of the videos in the store."""
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"path": f"flaky://{source}/clip_{k}.mp4", "caption": f"{k}"}) + "\n"
                            for k in range(7)))
    return path


class Clock:
    """Time that passes only where somebody waits, or where an action takes some."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, list[float]()

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False

    def backoff(self, patience: float) -> Backoff:
        return Backoff(patience, clock=lambda: self.now, wait=self.wait)


def outage(clock: Clock, until: float, takes: float = 0.0) -> Any:
    def action() -> str:
        clock.now += takes
        if clock.now < until:
            raise OSError("down")
        return "done"

    return action


def test_an_outage_is_waited_for_and_patience_is_bounded() -> None:
    clock = Clock()
    retries = clock.backoff(300.0)
    assert retries.run(outage(clock, 200.0), lambda error: True) == "done"
    assert clock.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    clock.waits.clear()  # what healed costs no patience
    with pytest.raises(OSError, match="down"):
        retries.run(outage(clock, 1e9), lambda error: True)
    assert clock.waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    clock.waits.clear()
    for _ in range(1000):  # further files that fail for good are not waited for at all
        with pytest.raises(OSError, match="down"):
            retries.run(outage(clock, 1e9), lambda error: True)
    assert clock.waits == [] and retries.run(lambda: 1, lambda error: True) == 1
    slow = clock.backoff(300.0)  # attempts that take long count, too
    with pytest.raises(OSError, match="down"):
        slow.run(outage(clock, 1e9, takes=120.0), lambda error: True)
    assert clock.waits == [1, 2, 4]
    clock.waits.clear()
    with pytest.raises(OSError, match="down"):
        clock.backoff(300.0).run(outage(clock, 1e9), lambda error: False)
    cancelled = clock.backoff(300.0)
    cancelled.cancel()
    with pytest.raises(OSError, match="down"):
        cancelled.run(outage(clock, 1e9), lambda error: True)
    assert clock.waits == []


def test_patience_comes_back_with_the_time_and_broken_files_cost_a_twentieth_of_it() -> None:
    clock = Clock()
    retries = clock.backoff(300.0)

    def broken() -> None:
        with pytest.raises(OSError, match="down"):
            retries.run(outage(clock, 1e9), lambda error: True)

    broken()
    clock.waits.clear()
    for _ in range(1000):  # files that never heal, with others between them
        clock.now += 10.0
        assert retries.run(lambda: 1, lambda error: True) == 1
        broken()
    assert sum(clock.waits) <= 1000 * 10.0 / backoff.RECOVERY + backoff.MAX_DELAY
    clock.now += 3 * 3600.0  # all is well for hours
    assert retries.run(outage(clock, clock.now + 200.0), lambda error: True) == "done"


def failing(real: Any, errors: list[Exception], *endings: str) -> Any:
    """`real`, but each of these errors is raised once, where an argument is a path with such an ending."""
    def call(*arguments: Any, **options: Any) -> Any:
        if errors and any(str(one).endswith(endings) for one in arguments):
            raise errors.pop(0)
        return real(*arguments, **options)

    return call


def eio() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def test_a_listing_waits_for_each_part_of_a_source(source: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions, tars, lists and folders, here and at a URL."""
    (source / "sub").mkdir()
    for k in range(7):
        (source / f"clip_{k}.txt").write_text(f"caption {k}")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(source.glob("clip_*")):
            tar.add(path, path.name)
    rows = [{"path": f"source/clip_{k}.mp4"} | ({} if k else {"caption": "caption 0"}) for k in range(7)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/patient/source", recursive=True)
    memory.put(str(tmp_path / "a.tar"), "/patient/a.tar")
    monkeypatch.setattr(type(memory), "find", AbstractFileSystem.find)  # as most systems have it: folder by folder
    away = [RuntimeError("503 Slow Down"), ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError()]
    for what, target, name, errors, ending in [
            (source, entries, "read_path", [eio(), eio()], "_3.txt"),
            (source, os, "scandir", [eio()], "sub"),
            (tmp_path / "a.tar", tars, "open_path", [eio()], "a.tar"),
            (tmp_path / "list.jsonl", manifests, "open", [eio()], "list.jsonl"),
            (tmp_path / "list.jsonl", entries, "read_path", [eio()], "_3.txt"),
            ("memory://patient/source", entries, "read_path", away, "_3.txt"),
            ("memory://patient/source", type(memory), "ls", away, "source"),
            ("memory://patient/a.tar", tars, "open_path", away, "a.tar")]:
        clock, left = Clock(), list(errors)
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing(getattr(target, name, open), left, ending), raising=False)
            found = list_entries(what, backoff=clock.backoff(300.0))
        assert not left and clock.waits == [1.0, 2.0, 4.0][:len(errors)], what
        assert not found.set_aside and [entry.captions for entry in found.entries] == [
            (f"caption {k}",) for k in range(7)], what


def test_a_remote_folder_that_cannot_be_listed_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in it is not as good as gone, as fsspec's own `find` would have it."""
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/partly/good", recursive=True)
    memory.put(str(source), "/partly/bad", recursive=True)
    monkeypatch.setattr(type(memory), "find", AbstractFileSystem.find)
    clock, down = Clock(), [OSError("503 Slow Down") for _ in range(100)]
    monkeypatch.setattr(type(memory), "ls", failing(type(memory).ls, down, "bad"))
    found = list_entries("memory://partly", backoff=clock.backoff(300.0))
    ((ref, error),) = found.set_aside
    assert len(found.entries) == 7 and (ref.name, error.kind) == ("bad", "remote") and "503" in error.reason
    assert 300 <= sum(clock.waits) < 400
    with pytest.raises(UserError, match="cannot reach memory://partly/bad: 503 Slow Down"):
        list_entries("memory://partly/bad")


class ResponseError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status}")
        self.status = status


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(("error", "remote", "kind", "retry"), [
    (OSError(errno.ENOSPC, "No space left on device"), False, "disk full", Retry.BACKOFF),
    (OSError(errno.EIO, "Input/output error"), False, "unavailable", Retry.BACKOFF),
    (OSError(errno.EMFILE, "Too many open files"), False, "unavailable", Retry.BACKOFF),
    (PermissionError(errno.EACCES, "Permission denied"), False, "permission", Retry.NEXT_BUILD),
    (FileNotFoundError("x"), False, "missing", Retry.NEXT_BUILD),
    (OSError("image file is truncated"), False, "corrupt", Retry.NEVER),
    (RuntimeError("bad atom"), False, "corrupt", Retry.NEVER),
    (VideoError("folder/x.mp4 is cut off", "copy it", "truncated"), False, "truncated", Retry.NEVER),
    (VideoError("folder/x.mp4 hangs", "", "hang"), False, "hang", Retry.HIGHER_LIMIT),
    (caused(VideoError("x cannot be opened"), av.error.PermissionError(errno.EACCES, "Permission denied")), False,
     "permission", Retry.NEXT_BUILD),
    (caused(VideoError("x cannot be opened"), av.error.InvalidDataError(1094995529, "Invalid data")), False, "corrupt",
     Retry.NEVER),
    (RuntimeError("503 Slow Down"), True, "remote", Retry.BACKOFF),
    (ResponseError(503), True, "remote", Retry.BACKOFF),
    (ConnectionResetError(errno.ECONNRESET, "reset"), True, "remote", Retry.BACKOFF),
    (TimeoutError(), True, "remote", Retry.BACKOFF),
    (ResponseError(403), True, "permission", Retry.NEXT_BUILD),
    (ResponseError(404), True, "missing", Retry.NEXT_BUILD),
    (OSError(errno.ENOSPC, "No space left on device"), True, "disk full", Retry.BACKOFF),
    (ImportError("Install s3fs"), True, "setup", Retry.NEXT_BUILD),
    (ValueError("Protocol not known: nonsense"), True, "setup", Retry.NEXT_BUILD)])
def test_the_table_of_failures(error: Exception, remote: bool, kind: str, retry: Retry) -> None:
    failure = to_video_error(error, "folder/x.mp4", remote=remote)
    assert (failure.kind, retry_policy(failure)) == (kind, retry) and kind in KINDS
    assert failure.reason.count("folder/x.mp4") == 1
    assert str(to_video_error(caused(failure, error), "folder/x.mp4", remote=remote)) == str(failure)  # given once


@pytest.mark.parametrize(("free", "kind"), [(2**26, "memory"), (2**34, "corrupt")])
def test_a_failed_allocation_is_the_files_fault_if_memory_is_free(
        monkeypatch: pytest.MonkeyPatch, free: int, kind: str) -> None:
    """A damaged header asks for pictures of any size."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    for error in (MemoryError(), caused(VideoError("x cannot be opened"), av.error.MemoryError(errno.ENOMEM, "none"))):
        assert to_video_error(error, "x").kind == kind


def test_a_disk_that_is_full_while_a_member_of_a_tar_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"12345")
    ref = MediaRef("a.tar::x.mp4", str(tmp_path / "a.tar"), "s", 0, 5)
    with ref.open_local() as path:
        assert path.read_bytes() == b"12345"
    with monkeypatch.context() as patch, pytest.raises(VideoError, match=r"a.tar::x.mp4 cannot be read") as caught:
        patch.setattr(sources.shutil, "copyfileobj", None)
        patch.setattr(sources, "_copy", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        ref.open_local().__enter__()
    assert caught.value.kind == "disk full"
    with monkeypatch.context() as patch, pytest.raises(VideoError, match="no folder for temporary files") as caught:
        patch.setattr(tempfile, "_candidate_tempdir_list", list)
        patch.setattr(tempfile, "tempdir", None)
        ref.open_local().__enter__()
    assert caught.value.kind == "disk full"
    with pytest.raises(VideoError, match="4 bytes are missing") as caught:
        MediaRef("a.tar::x.mp4", str(tmp_path / "a.tar"), "s", 1, 8).open_local().__enter__()
    assert caught.value.kind == "truncated"
    with pytest.raises(KeyError), ref.open_local():  # what is raised by whoever reads is not ours
        raise KeyError


@pytest.mark.parametrize(("scratch_gb", "down", "fetches"), [(0.0, "0", 14), (1.0, "4", 7)])
def test_an_outage_within_a_build_costs_nothing(source: Path, remote: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch, scratch_gb: float, down: str,
                                                fetches: int) -> None:
    """With scratch each file is fetched once, before the second outage."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.01)
    vae = tiny_vae()
    with pytest.MonkeyPatch.context() as patch:
        encode = Executor.encode

        def down_again(self: Executor, units: Iterable[EncodeUnit]) -> Any:
            planned = list(units)
            (source / "down").write_text("4")
            return encode(self, planned)

        patch.setattr(Executor, "encode", down_again)
        (source / "down").write_text("9")  # also seven stamps
        summary = build_cache(remote, tmp_path / "cache", vae, scratch_gb=scratch_gb, **SETTINGS)
    assert (summary.done, summary.set_aside, summary.share_set_aside) == (7, [], 0)
    assert (source / "down").read_text() == down
    size = sum(path.stat().st_size for path in source.glob("*.mp4"))
    assert (summary.usage["fetches"], summary.usage["fetched_bytes"]) == (fetches, fetches // 7 * size)


def test_an_outage_of_a_whole_build_is_not_recorded(source: Path, remote: Path, tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status says so, and the same command goes on when it has passed."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    command = ["cache", "build", str(remote), str(tmp_path / "cache"), "--vae", str(tmp_path / "vae"), "--frames", "5",
               "--size", "16", "16", "--workers", "1", "--patience", "0"]
    (source / "down").write_text("1000")
    assert main(command) == main([*command, "--dry-run"]) == 3
    printed = capsys.readouterr()
    assert "error: 100% of the files were set aside, more than --max-set-aside 0.5" in printed.err
    assert "503 Slow Down" in printed.out and "7 of these are transient; the next build tries them again" in printed.out
    assert main([*command, "--max-set-aside", "1"]) == 0
    assert {row["kind"] for row in read_rejects(tmp_path / "cache").to_pylist()} == {"remote"}
    assert not list((tmp_path / "cache").rglob("files*")) and not (tmp_path / "cache/work").exists()
    (source / "down").unlink()
    assert main(command) == 0
    assert "7 clips encoded, 0 reused, 0 set aside" in capsys.readouterr().out
    assert not len(read_rejects(tmp_path / "cache"))


def fail_on(kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch, function: str) -> list[str]:
    """Let requests for these files fail with such a kind; the names of all that are asked for."""
    ask, asked = getattr(DecodePool, function), list[str]()

    def failing(self: DecodePool, ref: MediaRef, **arguments: Any) -> Any:
        asked.append(ref.name)
        if ref.name in kinds:
            raise VideoError(f"{ref} fails", "wait", kinds[ref.name])
        return ask(self, ref, **arguments)

    monkeypatch.setattr(DecodePool, function, failing)
    return asked


@pytest.mark.parametrize("kind", ["remote", "permission"])
def test_transient_failures_do_not_stay_in_shards(source: Path, tmp_path: Path, kind: str) -> None:
    """Beside one that may not, in one shard, and whatever was built in between."""
    vae, cache = tiny_vae(), tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        fail_on({"clip_1.mp4": kind, "clip_2.mp4": "corrupt", "clip_5.mp4": kind}, patch, "decode_frames")
        first = build_cache(source, cache, vae, **SETTINGS)
        again = build_cache(source, cache, vae, **SETTINGS)
    for summary, done in ((first, 4), (again, 0)):
        assert (summary.done, sorted(entry.path for entry in summary.set_aside)) == (
            done, ["clip_1.mp4", "clip_2.mp4", "clip_5.mp4"])
        assert summary.share_set_aside == pytest.approx(3 / 7)
    healed = build_cache(source, cache, vae, **SETTINGS)
    assert (healed.done, [entry.path for entry in healed.set_aside]) == (2, ["clip_2.mp4"])
    assert [entry["path"] for entry in read_partition(open_storage(cache), 0).failures] == ["clip_2.mp4"]
    assert build_cache(source, cache, vae, retry=True, **SETTINGS).done == 1


def test_a_build_that_was_stopped_tries_again_what_it_had_failed_on(source: Path, tmp_path: Path) -> None:
    vae, cache, encode = tiny_vae(), tmp_path / "cache", AutoencoderKLODVAE.encode
    calls = iter(range(100))

    def stopped(self: AutoencoderKLODVAE, x: torch.Tensor) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, x)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_on({"clip_0.mp4": "remote", "clip_1.mp4": "remote", "clip_2.mp4": "remote", "clip_4.mp4": "remote"}, patch,
                "decode_frames")
        patch.setattr(AutoencoderKLODVAE, "encode", stopped)
        build_cache(source, cache, vae, **SETTINGS | {"batch": 1})
    assert list(cache.glob("partitions/00000/[0-9]*.parquet"))
    assert not (cache / "partitions/00000/index.parquet").exists()
    summary = build_cache(source, cache, vae, **SETTINGS)
    assert summary.set_aside == [] and len(LatentCache(cache)) == 7 == len(set(LatentCache(cache).ids))


def test_transient_failures_of_probing_are_not_recorded(source: Path, tmp_path: Path) -> None:
    some = [MediaRef(path.name, str(path), sources.local_version_tag(path)) for path in sorted(source.glob("*.mp4"))]
    gone = MediaRef("gone.mp4", str(source / "gone.mp4"), "")
    storage = open_storage(tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch, DecodePool(1) as pool:
        asked = fail_on({"clip_1.mp4": "remote", "clip_2.mp4": "corrupt"}, patch, "probe")
        for expected in ([path.name for path in sorted(source.glob("*.mp4"))] + ["gone.mp4"],
                         ["clip_1.mp4", "gone.mp4"]):
            asked.clear()
            found = probe_files([*some, gone], storage, 0, partial(probe_each, pool, BuildSettings()), seconds=60.0)
            assert isinstance(found[some[0]], MediaInfo)
            assert getattr(found[gone], "kind", "") == "missing" and "no such file" in str(found[gone])
            assert sorted(asked) == sorted(expected)
