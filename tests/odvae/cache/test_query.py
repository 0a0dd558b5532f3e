"""SQL and statistics of a cache that a build has not finished, and compact sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_cache import SHAPE, tiny_vae

from odvae.cache import LatentCache, build_cache
from odvae.cache.encoder import LatentEncoder
from odvae.cache.hashes import HashMap, HashSet
from odvae.cache.maintain.export import export
from odvae.cache.maintain.query import query
from odvae.cache.maintain.statistics import _quantile, stats
from odvae.cache.partition import iter_partitions
from odvae.utils.storage import open_storage


def test_shards_that_are_not_in_an_index_are_found(source: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a build that was interrupted in its third partition."""
    encode, calls = LatentEncoder.encode, list[int]()

    def failing(self: LatentEncoder, videos: torch.Tensor) -> torch.Tensor:
        calls.append(len(videos))
        if sum(calls) > 6:  # two are at hand: the fifth is committed
            raise OSError("the disk is gone")
        return encode(self, videos)

    cache, settings = tmp_path / "cache", SHAPE | {"partitions": 2, "shard_clips": 1, "batch": 1, "psnr_clips": 0}
    monkeypatch.setattr(LatentEncoder, "encode", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        build_cache(source, cache, tiny_vae(), **settings)
    uncommitted = list(cache.glob("partitions/*/*-*.parquet"))
    opened = LatentCache(cache)
    assert uncommitted and len(opened) >= len(uncommitted)
    for part in opened.parts:
        assert part.least_content == min(opened.read_rows(part.number, ("content",))["content"].to_pylist())
    assert query(cache, "select count(*) as n from clips") == ["n", str(len(opened))]
    rows = [f"select {column} from clips order by id" for column in ("id", "caption", "shape", "checksum")]
    for sql in rows:
        assert len(query(cache, sql)) == 1 + len(opened)
    assert stats(cache)[0].startswith(f"{len(opened)} clips of {len(opened)} files")
    assert query(cache, "select * from clips order by id", tmp_path / "all.jsonl") == [
        f"{len(opened)} rows in {tmp_path / 'all.jsonl'}"]
    written = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == sorted(opened.ids)
    assert export(cache, tmp_path / "out", "safetensors") == len(opened)
    assert sum(len(one.table) for one in iter_partitions(open_storage(cache))) == len(opened)


def test_a_set_of_hashes_takes_eight_bytes_each() -> None:
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(2000)]
    some = HashSet()
    assert not some.contains(hashes).any()
    for k in range(0, 1000, 7):
        some.update(hashes[k : min(k + 7, 1000)])
        some.update(hashes[:3])
    assert len(some) == 1000 and some._sorted.nbytes == 8000
    assert some.contains(hashes).tolist() == [True] * 1000 + [False] * 1000


def test_a_map_of_hashes_finds_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odvae.cache.hashes.PENDING", 16)  # so that a bin is filled several times
    keys = np.random.default_rng(0).integers(0, 2**64, 600, np.uint64)
    found = HashMap(np.split(keys[:500], [0, 3, 200, 201]))
    numbers = np.searchsorted([0, 3, 200, 201], np.arange(500), "right")
    assert len(found) == 500 and found.find(keys).tolist() == [*numbers.tolist(), *[-1] * 100]
    assert HashMap([]).find(keys[:1]).tolist() == [-1]


def test_quantiles_of_a_histogram() -> None:
    values = np.random.default_rng(0).random(10_001) ** 2
    histogram = np.bincount((values * 65536).astype(int), minlength=65536)
    for share in (.05, .5, .95):
        assert abs(_quantile(histogram, share) - np.quantile(values, share)) < 1e-4
