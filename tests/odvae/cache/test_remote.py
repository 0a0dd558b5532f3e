"""A cache in an object store: read as from a folder, through a bounded disk cache that processes share, in an order
that is a pure function of the step; an outage costs time only."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from tiny_cache import NUMBERED, SMALL_SHARDS, read_files, tiny_vae
from waiting import TIMEOUT

from odvae.cache import BucketBatches, LatentCache, LatentDataset, build_cache
from odvae.cache import shard_cache as shard_cache_module
from odvae.cache.embed import embed_captions
from odvae.cache.maintain.statistics import stats
from odvae.cache.maintain.text import verify_text
from odvae.cache.order import WindowShuffle
from odvae.cache.partition import read_partition, write_partition
from odvae.cache.prefetch import ShardPrefetcher
from odvae.cache.shard_cache import ShardCache, shard_cache
from odvae.cache.text import TextStore, text_storage
from odvae.utils.errors import UserError
from odvae.utils.storage import RemoteStorage, open_storage

FILES = NUMBERED
SETTINGS: dict[str, Any] = SMALL_SHARDS | {"partitions": 4}  # of `partitioned`


@pytest.fixture(autouse=True)
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shard cache."""
    monkeypatch.setenv("ODVAE_SHARD_CACHE", str(tmp_path / "shards"))
    monkeypatch.setenv("ODVAE_SHARD_CACHE_GB", "1")
    return tmp_path / "shards"


@pytest.fixture
def url(partitioned: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for name, data in read_files(partitioned).items():
        fs.pipe_file(f"/bucket/read/{name}", data)
    yield "memory://bucket/read"
    fs.rm("/bucket", recursive=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr("odvae.utils.backoff.FIRST_DELAY", 0.0)


class Letters:
    dim, fingerprint = 3, "letters" * 8

    def encode(self, captions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, captions)) + 1
        mask = torch.arange(length) < torch.tensor([len(caption) + 1 for caption in captions])[:, None]
        return torch.ones(len(captions), length, self.dim), mask


def test_a_cache_at_a_url_is_read_as_one_in_a_folder(url: str, partitioned: Path, shards: Path) -> None:
    here, there = LatentCache(partitioned), LatentCache(url)
    assert there.path == url and there.ids == here.ids and there.shapes.tolist() == here.shapes.tolist()
    for opened in (there, pickle.loads(pickle.dumps(there))):
        assert all(opened.stored(i).equal(here.stored(i)) for i in range(FILES))
        assert [opened.value(i, "captions") for i in range(FILES)] == here.column("captions").to_pylist()
    assert there.take([5, 1], "content") == here.take([5, 1], "content")
    assert len(list(shards.iterdir())) == len(list(partitioned.glob("partitions/*/*.safetensors"))) + 1  # and a lock
    with pytest.raises(UserError, match="memory://bucket/none is not a latent cache"):
        LatentCache("memory://bucket/none")


def test_an_epoch_at_a_url_has_every_clip_once_at_any_step(url: str) -> None:
    dataset = LatentDataset(LatentCache(url))
    buckets = dataset.buckets(window=2)
    whole = [[(key.clip, key.epoch) for key in batch] for batch in BucketBatches(buckets, 2, steps=3 * FILES // 2)]
    flat = [clip for batch in whole for clip, _ in batch]
    epochs = [flat[FILES * k : FILES * (k + 1)] for k in range(3)]
    assert all(sorted(epoch) == list(range(FILES)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    again = BucketBatches(LatentDataset(LatentCache(url)).buckets(window=2), 2)
    assert [[tuple(key) for key in again.batch(step)] for step in (17, 3, 20, 0)] == [
        whole[step] for step in (17, 3, 20, 0)]
    shards = [dataset.caches[0].shard_of(clip) for clip in epochs[0]]
    assert len({(shard, k) for k in range(0, FILES, 6) for shard in shards[k : k + 6]}) <= 3 * 3  # few at a time


@pytest.mark.parametrize("window", [4, 20])
def test_how_random_windows_of_shards_are(window: int) -> None:
    """The figure in the log is the one that is counted: neighbours of the source in one batch."""
    shards, clips, batch = 60, 50, 20
    n = shards * clips
    fake: Any = SimpleNamespace(bucket_names=["a", "b"], codes=np.arange(n) % 3 // 2,
                                first_rows=np.arange(0, n + 1, clips), shard_bytes=lambda chosen: len(chosen))
    fake.shard_counts = np.stack([np.bincount(fake.codes[a:b], minlength=2) for a, b in pairwise(fake.first_rows)])
    excluded = np.array([0, 7, 99])
    order = WindowShuffle(fake, ["a"], window, excluded)
    expected = set(np.flatnonzero(fake.codes == 0).tolist()) - {0, 7, 99}
    assert len(order) == len(expected) and order.window_bytes == window
    met, epochs = 0, 40
    for epoch in range(epochs):
        drawn = np.array([order.clip_at(0, 0, epoch, i) for i in range(len(order))])
        assert set(drawn.tolist()) == expected
        batches = np.empty(n, int)
        batches[drawn] = np.arange(len(drawn)) // batch
        pairs = [(a, b) for a, b in pairwise(sorted(expected)) if a // clips == b // clips]
        met += sum(batches[a] == batches[b] for a, b in pairs)
    in_full_shuffle = epochs * len(pairs) * (batch - 1) / (len(order) - 1)
    assert met / in_full_shuffle == pytest.approx(order.clustering, rel=.1) and order.clustering > 2.9


def test_the_shard_cache_is_bounded_and_keeps_what_is_used(url: str, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    storage = open_storage(url)
    for name in "abcd":
        storage.write(name, bytes([ord(name)]) * 100)
    files = ShardCache(tmp_path / "few", 250)
    held = files.fetch(storage, "a", 100)
    for name in "bcd":
        files.fetch(storage, name, 100).close()
        assert files.used() <= 250 and held.path.exists()
    assert {path.name[-1] for path in files.folder.glob("[!.]*")} == {"a", "d"}
    other = files.fetch(storage, "d", 100)
    assert other.path.read_bytes() == b"d" * 100 and not caplog.records
    more = files.fetch(storage, "b", 100)  # what is in use is more than the limit
    assert files.used() == 300 and "set ODVAE_SHARD_CACHE_GB to more" in caplog.text
    for each in (held, other, more):
        each.close()
    files.fetch(storage, "c", 100)
    assert files.used() <= 250
    with pytest.raises(UserError, match="truncated or changed"):
        files.fetch(storage, "c", 101)
    with pytest.raises(UserError, match="was removed"):
        files.fetch(storage, "none", 10)
    assert not list(files.folder.glob("*.part"))


def test_an_interrupted_download_never_counts(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    storage.write("a", b"a" * 100)
    files = ShardCache(tmp_path / "few", 1000)
    monkeypatch.setattr(shard_cache_module, "RANGE_BYTES", 30)
    script = ("import os, sys\nfrom odvae.cache import shard_cache\nfrom odvae.utils.storage import open_storage\n"
              "from pathlib import Path\nimport fsspec\n"
              "fsspec.filesystem('memory').pipe_file('/bucket/read/a', b'a' * 100)\nshard_cache.RANGE_BYTES = 30\n"
              "shard_cache.sync = lambda path: os._exit(9)\n"
              f"shard_cache.ShardCache(Path({str(files.folder)!r}), 1000).fetch(open_storage({url!r}), 'a', 100)\n")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert [path.suffix for path in files.folder.glob("[!.]*")] == [".part"]
    reads: list[int] = []
    cat = type(fsspec.filesystem("memory")).cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        reads.append(start)
        return cat(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: files.fetch(storage, "a", 100), range(4)))
    assert {one.path.read_bytes() for one in found} == {b"a" * 100} and reads == [0, 30, 60, 90]  # by one of them
    assert not list(files.folder.glob("*.part"))


def test_a_full_disk_is_waited_for(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    storage = open_storage(url)
    for name in "ab":
        storage.write(name, bytes([ord(name)]) * 100)
    files = ShardCache(tmp_path / "few", 1000)
    files.fetch(storage, "a", 100).close()
    failures, open_range = iter(range(3)), RemoteStorage.open

    def full(self: Any, *arguments: Any) -> Any:
        if next(failures, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_range(self, *arguments)

    monkeypatch.setattr(RemoteStorage, "open", full)
    assert files.fetch(storage, "b", 100).path.read_bytes() == b"b" * 100
    assert files.used() == 100  # the other made room
    failures, files._backoff.patience = iter(range(99)), 0
    with pytest.raises(UserError, match=r"the disk of the shard cache is full.*set ODVAE_SHARD_CACHE"):
        files.fetch(storage, "a", 100)


def test_settings_of_the_shard_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shard_cache() is shard_cache() and shard_cache().limit == 1e9
    for wrong in ("0", "-1", "much", "nan"):
        monkeypatch.setenv("ODVAE_SHARD_CACHE_GB", wrong)
        with pytest.raises(UserError, match="give a size in GB"):
            shard_cache()
    for name in ("ODVAE_SHARD_CACHE", "ODVAE_SHARD_CACHE_GB"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shard_cache().folder == tmp_path / "odvae/shards" and 0 < shard_cache().limit <= 100e9


def test_shards_are_fetched_ahead(url: str, shards: Path) -> None:
    dataset = LatentDataset(LatentCache(url))
    batches = BucketBatches(dataset.buckets(window=1), 2)
    loaded, all_there, load = set[int](), threading.Event(), dataset.caches[0].load

    def announced(position: int) -> Any:
        found = load(position)
        loaded.add(position)
        if loaded >= wanted:
            all_there.set()
        return found

    dataset.caches[0].load = announced  # type: ignore[method-assign]
    wanted = {dataset.caches[0].shard_of(key.clip) for step in (1, 2, 3) for key in batches.batch(step)}
    prefetcher = ShardPrefetcher(dataset, lambda step: [key.clip for key in batches.batch(step)], steps=3)
    prefetcher.advance(0)
    assert all_there.wait(TIMEOUT) and loaded == wanted


def test_embeddings_are_read_and_written_at_a_url(url: str, partitioned: Path, tmp_path: Path) -> None:
    captions = LatentCache(url).captions
    _, done = embed_captions(url, Letters(), captions)
    assert done == FILES and embed_captions(url, Letters(), captions)[1] == 0
    again, here = TextStore(text_storage(url, Letters())), Path(shutil.copytree(partitioned, tmp_path / "cache"))
    assert all(again.embedding(caption).shape == (len(caption) + 1, 3) for caption in captions)
    assert any(f"text embeddings by Letters: {FILES} captions" in line for line in stats(url))
    assert "other" not in again and len(again) == FILES and verify_text(url) == (FILES, [])
    embed_captions(here, Letters(), captions)
    fs = fsspec.filesystem("memory")
    assert {name: fs.cat_file(f"/bucket/read/{name}") for name in read_files(here)} == read_files(here)


@pytest.mark.parametrize("fails", ["cat_file", "pipe_file", "ls", "info", "exists"])
def test_an_outage_costs_only_time(numbered: Path, partitioned: Path, fails: str, monkeypatch: pytest.MonkeyPatch,
                                   impatient: None) -> None:
    """Every third request fails twice."""
    memory = type(fsspec.filesystem("memory"))
    real, calls = getattr(memory, fails), iter(range(10**6))

    def flaky(*arguments: Any, **options: Any) -> Any:
        if next(calls) % 5 < 2:
            raise ConnectionError("503 Slow Down")
        return real(*arguments, **options)

    url = f"memory://flaky/{fails}"
    monkeypatch.setattr(memory, fails, flaky)
    build_cache(numbered, url, tiny_vae(), **SETTINGS)
    here, there = LatentCache(partitioned), LatentCache(url)
    assert there.ids == here.ids and all(there.stored(i).equal(here.stored(i)) for i in range(FILES))


def test_what_is_not_an_outage_is_not_retried(url: str) -> None:
    storage = open_storage(url)
    storage._backoff.cancel()  # type: ignore[attr-defined]
    for error in (FileNotFoundError(), PermissionError(), ValueError()):
        with pytest.raises(type(error)):
            storage._run(lambda fs, error=error: (_ for _ in ()).throw(error))  # type: ignore[attr-defined]
    assert open_storage("memory://user:secret@bucket/x").path("a") == "memory://bucket/x/a"  # for messages


def test_two_writers_of_a_partition_do_not_overwrite_each_other(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(url)
    partition = next(p for k in range(4) if (p := read_partition(storage, k)).shards)
    first = write_partition(storage, partition)
    assert write_partition(storage, partition) == first  # the same bytes
    changed = replace(partition, failures=({"id": "x", "path": "", "start": 0.0, "kind": "hang", "reason": "",
                                            "advice": "", "limit": 1.0},))
    with pytest.raises(UserError, match="another process has changed"):
        write_partition(storage, changed)
    assert read_partition(storage, partition.number).generation == partition.generation + 1

    version = RemoteStorage.version
    monkeypatch.setattr(RemoteStorage, "version", lambda self, name: None)  # it appears between look and write
    with pytest.raises(UserError, match="another process has changed"):
        write_partition(storage, replace(changed, generation=0))
    monkeypatch.setattr(RemoteStorage, "version", version)


def test_processes_share_the_shard_cache(partitioned: Path, shards: Path) -> None:
    """And a forked process reads on."""
    cache = LatentCache(f"file://{partitioned}")
    expected = [cache.stored(i).clone() for i in range(FILES)]
    before = {path: path.stat().st_ino for path in shards.iterdir()}
    child = os.fork()
    if not child:
        same = all(cache.stored(i).equal(latent) for i, latent in enumerate(expected))
        fresh = LatentCache(f"file://{partitioned}")
        os._exit(0 if same and all(fresh.stored(i).equal(latent) for i, latent in enumerate(expected)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert {path: path.stat().st_ino for path in shards.iterdir()} == before
    assert Counter(path.suffix for path in before)[".safetensors"] == len(before) - 1
