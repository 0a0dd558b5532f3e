"""A cache in partitions: the same clips whatever their number, wherever it lies, and nothing is lost on the way."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import NUMBERED, SMALL_SHARDS, latents_by_id, read_files, tiny_vae, write_noise

from odvae.cache import LatentCache, build_cache, format
from odvae.cache.build.builder import _count_partitions
from odvae.cache.build.settings import BuildSettings
from odvae.cache.maintain.merge import merge
from odvae.cache.maintain.verify import verify
from odvae.cache.partition import (
    iter_partitions,
    partition_of,
    read_partition,
    tensors_of,
)
from odvae.cli import main
from odvae.data.listing import scan_source
from odvae.utils.errors import UserError
from odvae.utils.storage import open_storage

SETTINGS = SMALL_SHARDS
FILES = NUMBERED


@pytest.fixture(scope="module")
def caches(numbered: Path, partitioned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Caches of one source by their number of partitions."""
    one = tmp_path_factory.mktemp("caches") / "1"
    build_cache(numbered, one, tiny_vae(), **SETTINGS)
    return {1: one, 4: partitioned}


@given(st.text(st.characters(blacklist_characters="/.", blacklist_categories=["Cs"]), min_size=1),
       st.integers(0, 12))
def test_what_belongs_together_is_in_one_partition(name: str, log_count: int) -> None:
    count = 2**log_count
    number = partition_of(f"folder/{name}.mp4", count)
    assert 0 <= number < count and number == partition_of(f"folder/{name}.txt", count)
    assert number == partition_of(f"folder/{name}.mp4", 2 * count) % count  # so that a merge splits or joins them
    assert partition_of(f"{name}.tar::a.mp4", count) == partition_of(f"{name}.tar::b.mp4", count)


def test_partitions_have_about_the_same_size() -> None:
    sizes = Counter(partition_of(f"part_{k % 10}/{k}.mp4", 64) for k in range(64 * 200))
    assert len(sizes) == 64 and max(sizes.values()) < 280 and min(sizes.values()) > 130  # five standard deviations


def test_the_files_of_two_partitions_of_a_new_cache_fit_the_scratch(tmp_path: Path) -> None:
    for k in range(8):
        (tmp_path / f"{k}.mp4").write_bytes(bytes(1000))
    fsspec.filesystem("memory").put(str(tmp_path), "/sized", recursive=True)
    for source, gigabytes, partitions in (("memory://sized", 4e-6, 4), ("memory://sized", 1.0, 1),
                                          ("memory://sized", 0.0, 1), (tmp_path, 4e-6, 1)):
        with scan_source(source) as scanned:
            assert _count_partitions(scanned, BuildSettings(scratch_gb=gigabytes)) == partitions


def test_the_number_of_partitions_does_not_change_the_clips(caches: dict[int, Path]) -> None:
    one, four = latents_by_id(caches[1]), latents_by_id(caches[4])
    assert one.keys() == four.keys() and len(one) == FILES
    assert all(four[name] == pytest.approx(latent, abs=1e-3) for name, latent in one.items())  # in other batches
    assert len(list(caches[4].glob("partitions/*/index.parquet"))) > 1
    assert not verify(caches[4]).faults
    columns = {row["id"]: row["captions"] for row in LatentCache(caches[4]).index.to_pylist()}
    assert columns == {row["id"]: row["captions"] for row in LatentCache(caches[1]).index.to_pylist()}
    for number in (0, 3):
        with pytest.raises(UserError, match="power of two"):
            build_cache(caches[1], caches[1].parent / "none", tiny_vae(), partitions=number or 6, **SETTINGS)


@pytest.mark.parametrize("partitions", [1, 2, 8])
def test_a_cache_is_copied_into_other_partitions(caches: dict[int, Path], numbered: Path, tmp_path: Path,
                                                 partitions: int) -> None:
    assert merge([caches[4]], tmp_path / "out", partitions) == (FILES, 0)
    before, after = latents_by_id(caches[4]), latents_by_id(tmp_path / "out")
    assert before.keys() == after.keys() and all(after[name].equal(latent) for name, latent in before.items())
    assert not verify(tmp_path / "out").faults
    assert format.read_header(tmp_path / "out").partitions == partitions
    assert build_cache(numbered, tmp_path / "out", tiny_vae(), **SETTINGS).done == 0


def test_merged_caches_may_have_other_numbers_of_partitions(caches: dict[int, Path], tmp_path: Path) -> None:
    assert merge([caches[1], caches[4]], tmp_path / "out") == (FILES, FILES)
    assert format.read_header(tmp_path / "out").partitions == 4 and not verify(tmp_path / "out").faults


def test_a_cache_in_an_object_store_has_the_same_files(caches: dict[int, Path], numbered: Path, tmp_path: Path) -> None:
    url = "memory://bucket/cache"
    build_cache(numbered, url, tiny_vae(), partitions=4, **SETTINGS)
    fs = fsspec.filesystem("memory")
    stored = {name.removeprefix("/bucket/cache/"): fs.cat_file(name) for name in fs.find("/bucket/cache")}
    assert stored.pop("build-report.json") and stored == read_files(caches[4])
    assert build_cache(numbered, url, tiny_vae(), **SETTINGS).done == 0
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="exists and is not a latent cache"):
        fs.pipe_file("/bucket/other/file", b"")
        build_cache(numbered, "memory://bucket/other", tiny_vae(), **SETTINGS)
    with pytest.raises(UserError, match="unheard"):
        build_cache(numbered, "unheard://bucket", tiny_vae(), **SETTINGS)


def test_a_source_that_changes_while_a_build_is_interrupted(numbered: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had encoded is kept, although the shards of the others are not those that were planned."""
    grown, cache, encode = Path(shutil.copytree(numbered, tmp_path / "grown")), tmp_path / "cache", tiny_vae().encode
    calls, vae = iter(range(100)), tiny_vae()

    def stopped(x: torch.Tensor) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return encode(x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vae, "encode", stopped)
        build_cache(grown, cache, vae, **SETTINGS)
    kept = latents_by_id(cache)  # an unfinished cache can be read
    assert 0 < len(kept) < FILES
    for k in range(3):
        write_noise(grown / f"a_{k}.mp4", 100 + k)  # before the others, in their order
    (grown / "clip_9.mp4").unlink()
    summary = build_cache(grown, cache, tiny_vae(), **SETTINGS)
    assert summary.done == FILES + 2 - summary.reused and summary.reused >= len(kept) - 1
    after = latents_by_id(cache)
    assert all(after[name].equal(latent) for name, latent in kept.items()) and not verify(cache).faults
    assert build_cache(grown, cache, tiny_vae(), **SETTINGS).done == 0


def test_a_reader_keeps_what_it_saw(numbered: Path, tmp_path: Path) -> None:
    """A build that adds clips, and commits shards that the reader saw uncommitted."""
    few, cache = tmp_path / "few", tmp_path / "cache"
    few.mkdir()
    for k in range(5):
        shutil.copy(numbered / f"clip_{k}.mp4", few)
    build_cache(few, cache, tiny_vae(), **SETTINGS)
    opened = LatentCache(cache)
    build_cache(numbered, cache, tiny_vae(), **SETTINGS)
    assert len(opened.ids) == len(opened) == 5 and len(LatentCache(cache)) == FILES
    now = latents_by_id(cache)
    assert all(opened.stored(i).equal(now[name]) for i, name in enumerate(opened.ids))


@pytest.mark.parametrize("change", [lambda sizes: sizes | {"gone.parquet": 1},
                                    lambda sizes: {name: size for name, size in sizes.items() if "safet" not in name}],
                         ids=["a shard's rows are in the index now", "a shard is there that was not listed"])
def test_a_partition_is_read_again_if_it_is_committed_meanwhile(caches: dict[int, Path], tmp_path: Path, change: Any,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(shutil.copytree(caches[1], tmp_path / "cache"))
    sizes, seen = type(storage).sizes, []

    def late(self: Any, folder: str) -> dict[str, int]:
        seen.append(folder)
        return change(sizes(self, folder)) if len(seen) == 1 else sizes(self, folder)

    monkeypatch.setattr(type(storage), "sizes", late)
    assert len(read_partition(storage, 0).table) == FILES and len(seen) == 2


def test_commands_take_parts_and_partitions(numbered: Path, caches: dict[int, Path], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    cache = tmp_path / "cache"
    command = ["cache", "build", str(numbered), str(cache), "--vae", str(tmp_path / "vae"), "--frames", "5",
               "--size", "16", "16", "--workers", "1", "--shard-clips", "3", "--batch", "2", "--partitions", "4"]
    assert main([*command, "--part", "2/2"]) == 0
    some = len(LatentCache(cache))
    assert 0 < some < FILES and f"{some} clips encoded" in capsys.readouterr().out
    assert main([*command, "--part", "1/2"]) == 0 and latents_by_id(cache).keys() == latents_by_id(caches[4]).keys()
    for wrong in ("0/2", "3/2", "two"):
        with pytest.raises(SystemExit):
            main([*command, "--part", wrong])
        assert "must be I/N with 1 <= I <= N" in capsys.readouterr().err


def test_rows_belong_to_their_shards(caches: dict[int, Path]) -> None:
    storage = open_storage(caches[4])
    partitions = list(iter_partitions(storage, ("id",)))
    assert sum(len(partition.table) for partition in partitions) == FILES
    for partition in partitions:
        for shard, rows in partition.tables():
            assert len(rows) == shard.clips and storage.exists(tensors_of(partition.number, shard.name))
