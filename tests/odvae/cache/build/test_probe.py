"""Records of earlier work: damaged ones, and those that are not to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_cache import SHAPE, tiny_vae

from odvae.cache import LatentCache, build_cache
from odvae.cache.build.decode_pool import DecodePool
from odvae.data.video.reader import VideoError
from odvae.utils.errors import UserError


def test_damaged_records_of_files_are_made_again(source: Path, tmp_path: Path) -> None:
    build_cache(source, tmp_path / "cache", tiny_vae(), **SHAPE)
    records = sorted((tmp_path / "cache").glob("partitions/*/files.parquet"))
    for path in records:
        path.write_bytes(b"PAR1 half")
    again = build_cache(source, tmp_path / "cache", tiny_vae(), **SHAPE)
    assert (again.done, again.reused, again.set_aside) == (0, 7, []) and records


def test_files_that_could_not_be_used_are_probed_again_on_request(source: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: DecodePool, ref: Any, **options: Any) -> Any:
        if ref.name == "clip_3.mp4":
            raise VideoError(f"{ref} cannot be opened", "leave it out", "corrupt")
        return real(self, ref, **options)

    real = DecodePool.probe
    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "probe", failing)
        assert build_cache(source, tmp_path / "cache", tiny_vae(), **SHAPE).done == 6
    assert build_cache(source, tmp_path / "cache", tiny_vae(), **SHAPE).done == 0
    assert build_cache(source, tmp_path / "cache", tiny_vae(), retry=True, **SHAPE).done == 1


def test_a_shard_whose_header_is_damaged_is_named(source: Path, tmp_path: Path) -> None:
    build_cache(source, tmp_path / "cache", tiny_vae(), **SHAPE)
    (shard,) = (tmp_path / "cache").glob("partitions/*/*.safetensors")
    whole = shard.read_bytes()
    for damaged in ((2**40).to_bytes(8, "little") + whole[8:], whole.replace(b'"F16"', b'"F32"'),
                    whole.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'), whole.replace(b'"shape"', b'"shapE"')):
        assert len(damaged) == len(whole) and damaged != whole
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{shard.name} is damaged"):
            [LatentCache(tmp_path / "cache").entry(i) for i in range(7)]
