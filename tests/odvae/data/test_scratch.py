"""Fetched files stay on local disk within a bound, each is fetched once, and what was interrupted never counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread
from typing import IO, Any

import fsspec
import pytest

from odvae.data import sources
from odvae.data.scratch import Scratch, open_scratch
from odvae.data.sources import MediaRef, info_version_tag
from odvae.data.video.reader import VideoError
from odvae.utils.temporary import temporary_folder


def remote(name: str, data: bytes) -> MediaRef:
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/scratch/{name}", data)
    url = f"memory://scratch/{name}"
    return MediaRef(name, url, info_version_tag(memory.info(f"/scratch/{name}")))


def read(ref: MediaRef, scratch: Scratch, fetched: list[int]) -> bytes:
    with ref.open_local(scratch, fetched.append) as path:
        return path.read_bytes()


def test_a_file_is_fetched_once_and_the_least_recently_used_are_removed() -> None:
    refs, fetched = [remote(f"{k}.mp4", bytes([k]) * 400) for k in range(3)], list[int]()
    with open_scratch(1e-6) as scratch:  # 1000 bytes
        assert scratch is not None
        folder = Path(scratch.folder)
        for k, number in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
            with refs[k].open_local(scratch, fetched.append) as held:
                assert held.read_bytes() == bytes([k]) * 400
            assert len(fetched) == number
            stored = sorted(folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime_ns)
            assert sum(path.stat().st_size for path in stored) <= 1000
            for age, path in enumerate(stored):  # a clock that ticks
                os.utime(path, (age, age))
        with refs[1].open_local(scratch) as held:
            for path in folder.glob("[0-9a-f]*"):
                path.unlink()
            assert held.read_bytes() == bytes([1]) * 400  # removed while it is read
    assert not folder.exists()


def test_threads_that_want_one_file_fetch_it_once(tmp_path: Path) -> None:
    ref, scratch, fetched = remote("a.mp4", b"x" * 1000), Scratch(str(tmp_path), 10**6), list[int]()
    barrier = Barrier(4)

    def run() -> None:
        barrier.wait()
        assert read(ref, scratch, fetched) == b"x" * 1000

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [1000]


def test_an_interrupted_fetch_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, scratch, fetched = remote("a.mp4", b"x" * 1000), Scratch(str(tmp_path), 10**6), list[int]()
    copy = sources._copy

    def cut(source: IO[bytes], target: Any, size: int | None) -> int:
        copy(source, target, 600)
        return 0  # as a server that closes the connection

    monkeypatch.setattr(sources, "_copy", cut)
    with pytest.raises(VideoError, match="400 bytes are missing") as caught:
        read(ref, scratch, fetched)
    assert caught.value.kind == "remote" and not fetched
    (part,) = tmp_path.iterdir()
    part.write_bytes(b"y" * 2000)  # of a process that was killed
    monkeypatch.setattr(sources, "_copy", copy)
    assert read(ref, scratch, fetched) == b"x" * 1000 and fetched == [1000]


def test_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    code = ("import os, signal\nfrom odvae.utils.temporary import temporary_folder\n"
            "with temporary_folder('odvae-test-') as folder:\n    (folder / 'x').touch()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.glob("odvae-test-*/x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        with temporary_folder("odvae-test-") as one:
            assert not left.exists()
            with temporary_folder("odvae-test-"):
                assert one.is_dir()
