"""The latent cache: it holds what the VAE says, bit for bit, however often its building was interrupted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_cache import SHAPE, read_files, tiny_vae, write_noise, write_noise_photo

from odvae.cache import LatentCache, build_cache, vae_fingerprint
from odvae.cache.build.decode_pool import DecodePool
from odvae.cache.build.executors.executor import Executor
from odvae.cache.build.report import BuildSummary
from odvae.cache.build.shard_encoder import EncodeUnit
from odvae.cache.maintain.verify import verify
from odvae.data.files import list_videos
from odvae.data.sources import MediaRef
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import VideoError, probe, read_clip, write_video
from odvae.inference.fingerprint import DTYPES
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils import files
from odvae.utils.errors import UserError

SETTINGS = SHAPE | {"shard_clips": 4, "workers": 2, "psnr_clips": 2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos that give eleven clips of 5 frames, captions for all but one, and a photo."""
    folder = tmp_path_factory.mktemp("videos")
    for k in range(10):
        path = folder / ("sub" if k == 3 else ".") / f"clip_{k}.mp4"
        write_noise(path, k, 10 if k == 4 else 5, size=(24, 64))
        if k:
            path.with_suffix(".txt").write_text(f"caption {k}")
    write_noise_photo(folder / "photo.png")
    return folder


class Encodes:
    """Counts the clips that a VAE encodes; fails after `until` calls."""

    def __init__(self, vae: AutoencoderKLODVAE, monkeypatch: pytest.MonkeyPatch, until: int = 10**9) -> None:
        self.clips, self.calls, self.until, encode = 0, 0, until, vae.encode

        def counted(x: torch.Tensor) -> Any:
            self.calls += 1
            if self.calls > self.until:
                raise KeyboardInterrupt
            self.clips += len(x)
            return encode(x)

        monkeypatch.setattr(vae, "encode", counted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_write_read_identity(videos: Path, tmp_path: Path, dtype: Any) -> None:
    vae = tiny_vae()
    summary = build_cache(videos, tmp_path / "cache", vae, dtype=dtype, **SETTINGS)
    cache = LatentCache(tmp_path / "cache", vae)
    assert (summary.done, summary.reused, summary.set_aside, summary.captions_from_names) == (12, 0, [], 2)
    assert len(cache) == len(set(cache.ids)) == 12
    assert summary.frames == 11 * 5 + 1 and summary.raw_bytes == summary.frames * 16 * 16 * 3
    assert summary.bytes == sum(len(data) for name, data in read_files(tmp_path / "cache").items()
                                if name.endswith(".safetensors"))

    stored = {(path, start): i for i, (path, start) in enumerate(zip(
        cache.index["path"].to_pylist(), cache.index["start"].to_pylist(), strict=True))}
    everything = []
    for path in list_videos(videos):
        text = path.with_suffix(".txt")
        for start in range(0, int(probe(path).duration * 8) // 5 * 5, 5):
            i = stored.pop((path.relative_to(videos).as_posix(), start / 8))
            x = to_tensor(resize_crop(read_clip(path, start / 8, 5, 8.0), 16, 16))
            with torch.inference_mode():
                mean = vae.encode(x[None]).latent_dist.mean[0]
            assert cache.entry(i).dtype == DTYPES[dtype] and cache.entry(i).shape == (4, 2, 2, 2)
            assert cache.entry(i).float() == pytest.approx(mean, abs=4e-2 if dtype == "bfloat16" else 4e-3)
            assert cache.captions[i] == (text.read_text() if text.exists() else path.stem.replace("_", " "))
            everything.append(cache.entry(i))
    assert list(stored) == [("photo.png", 0.0)] and cache.shapes[stored["photo.png", 0.0]].tolist() == [4, 1, 2, 2]
    everything.append(cache.entry(stored["photo.png", 0.0]))

    flat = torch.cat([latent.flatten(1) for latent in everything], 1).double()
    assert cache.latents_mean == pytest.approx(flat.mean(1).tolist(), rel=1e-9)
    assert cache.latents_std == pytest.approx(flat.std(1, correction=0).tolist(), rel=1e-9)
    copy = pickle.loads(pickle.dumps(cache))  # as a data loader's worker gets it
    assert all(torch.equal(copy.entry(i), cache.entry(i)) for i in range(-1, len(cache)))
    with pytest.raises(IndexError):
        cache.entry(12)


def test_stored_latents_are_the_encoded_ones_bit_for_bit(videos: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    vae, encoded, encode = tiny_vae(), [], AutoencoderKLODVAE.encode

    def recorded(x: torch.Tensor) -> Any:
        encoded.extend(encode(vae, x).latent_dist.mean.half().unbind())
        return encode(vae, x)

    monkeypatch.setattr(vae, "encode", recorded)
    build_cache(videos, tmp_path / "cache", vae, **SETTINGS)
    cache = LatentCache(tmp_path / "cache")
    assert len(encoded) == len(cache) == 12
    assert all(any(torch.equal(cache.entry(i), latent) for latent in encoded) for i in range(12))


def test_a_second_build_encodes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, cache = tiny_vae(), tmp_path / "cache"
    encodes = Encodes(vae, monkeypatch)
    build_cache(source, cache, vae, **SETTINGS)
    before = read_files(cache)
    vae.register_to_config(latents_mean=[1.0] * 4)  # measured on the cache; not a part of what made it
    again = build_cache(source, cache, vae, **SETTINGS)
    assert (again.done, again.reused, encodes.clips) == (0, 12, 12) and read_files(cache) == before

    (source / "clip_1.mp4").rename(source / "zebra.mp4")  # moves to the end, and loses its caption
    (source / "clip_2.txt").write_text("a new caption")
    shutil.copy(source / "clip_5.mp4", source / "copy_of_5.mp4")
    (source / "clip_6.mp4").unlink()
    renamed = build_cache(source, cache, vae, **SETTINGS)
    assert (renamed.done, renamed.reused, renamed.duplicates, encodes.clips) == (0, 11, 1, 12)
    index = {row["path"]: row for row in LatentCache(cache).index.to_pylist()}
    assert len(index) == 11 and {"zebra.mp4", "clip_6.mp4", "clip_5.mp4"} <= index.keys()
    assert (index["zebra.mp4"]["captions"], index["zebra.mp4"]["caption_from_name"]) == (["zebra"], True)
    assert index["clip_2.mp4"]["captions"] == ["a new caption"]
    assert {k: v for k, v in read_files(cache).items() if k.endswith("tensors")} == {
        k: v for k, v in before.items() if k.endswith("tensors")}

    write_video(source / "new.mp4", [np.zeros((6, 24, 64, 3), np.uint8)], 8.0)
    assert build_cache(source, cache, vae, **SETTINGS).done == 1 and encodes.clips == 13


def fail_on(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these files fail while their clips are decoded; probing them succeeds."""
    decode_frames = DecodePool.decode_frames

    def failing(self: DecodePool, ref: MediaRef, **arguments: Any) -> Any:
        if Path(ref.name).stem in names:
            raise VideoError(f"{ref} cannot be decoded beyond frame 3", "leave it out")
        return decode_frames(self, ref, **arguments)

    monkeypatch.setattr(DecodePool, "decode_frames", failing)


@pytest.fixture(scope="module")
def uninterrupted(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, BuildSummary]:
    """A source with bad files, its cache, and the summary of its build."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = Path(shutil.copytree(videos, folder / "source"))
    (source / "clip_00.mp4").write_text("no video")
    with pytest.MonkeyPatch.context() as patch:
        fail_on(("clip_1", "clip_8"), patch)
        return source, folder / "cache", build_cache(source, folder / "cache", tiny_vae(), **SETTINGS)


@pytest.mark.parametrize("until, kept", [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_an_interrupted_build_resumes(uninterrupted: tuple[Path, Path, BuildSummary], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch, until: int, kept: int) -> None:
    (source, expected, summary), cache = uninterrupted, tmp_path / "cache"
    fail_on(("clip_1", "clip_8"), monkeypatch)
    vae = tiny_vae()
    with monkeypatch.context() as patch:
        Encodes(vae, patch, until)
        with pytest.raises(KeyboardInterrupt):
            build_cache(source, cache, vae, **SETTINGS)
    shards = cache / "partitions/00000"
    assert len(list(shards.glob("[0-9]*.parquet"))) == kept  # two batches a shard: photo, 0 2; 4 4, 5 6; 7 9, 3
    (shards / ".00009-abc.safetensors.tmp-1-2").write_bytes(b"half")
    (shards / "00009-abc.safetensors").write_bytes(b"never committed")
    encodes = Encodes(vae, monkeypatch)
    resumed = build_cache(source, cache, vae, **SETTINGS)
    assert encodes.clips == resumed.done == summary.done - resumed.reused
    assert read_files(cache) == read_files(expected)
    assert {entry.path for entry in resumed.set_aside} == {entry.path for entry in summary.set_aside}
    assert sorted(entry.path for entry in summary.set_aside) == ["clip_00.mp4", "clip_1.mp4", "clip_8.mp4"]


def test_failed_clips_are_set_aside_and_retried_on_request(source: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_vae()
    with monkeypatch.context() as patch:
        fail_on(("clip_1", "clip_4"), patch)
        first = build_cache(source, tmp_path / "cache", vae, **SETTINGS)
        before = read_files(tmp_path / "cache")
        second = build_cache(source, tmp_path / "cache", vae, **SETTINGS)
    assert sorted(entry.path for entry in first.set_aside) == ["clip_1.mp4", "clip_4.mp4", "clip_4.mp4"]
    assert "beyond frame 3" in first.set_aside[0].reason
    assert sorted(map(str, first.set_aside)) == sorted(map(str, second.set_aside))
    rejects = pq.read_table(tmp_path / "cache/partitions/00000/rejects.parquet").to_pylist()
    assert [(row["kind"], row["advice"]) for row in rejects] == [("corrupt", "leave it out")] * 3
    assert build_cache(source, tmp_path / "cache", vae, **SETTINGS).done == 0  # what failed is not tried each time
    assert (first.done, second.done, second.reused) == (9, 0, 9) and read_files(tmp_path / "cache") == before
    healed = build_cache(source, tmp_path / "cache", vae, retry=True, **SETTINGS)
    assert not (tmp_path / "cache/partitions/00000/rejects.parquet").exists()
    assert (healed.done, healed.set_aside, len(LatentCache(tmp_path / "cache"))) == (3, [], 12)


def test_bad_files_are_set_aside_with_reasons(source: Path, tmp_path: Path) -> None:
    good = (source / "clip_1.mp4").read_bytes()
    (source / "empty.mp4").touch()
    (source / "text.mp4").write_text("no")
    (source / "cut.mp4").write_bytes(good[:-50])
    (source / "photo2.png").write_text("no")
    write_video(source / "short.mp4", [np.zeros((4, 16, 16, 3), np.uint8)], 8.0)
    (source / "clip_9.txt").write_bytes(b"\xff\xfe\xfa")
    summary = build_cache(source, tmp_path / "cache", tiny_vae(), **SETTINGS)
    reasons = {entry.path: str(entry) for entry in summary.set_aside}
    assert summary.done == 12 and len(summary.set_aside) == 6  # of clip_9 its caption alone
    assert summary.captions_from_names == 3
    for name, reason in [("empty.mp4", "is empty"), ("text.mp4", "cannot be opened"), ("cut.mp4", "is truncated"),
                         ("photo2.png", "not a readable image"), ("short.mp4", "too short"),
                         ("clip_9.mp4", "not UTF-8")]:
        assert reason in reasons[name]


def test_latents_that_are_not_finite_are_not_stored(videos: Path, tmp_path: Path) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6) if hasattr(vae.quant_conv, "bias") else vae.quant_conv.conv.bias.fill_(1e6)
    summary = build_cache(videos, tmp_path / "cache", vae, **SETTINGS)
    assert summary.done == 0 and len(summary.set_aside) == 12 and "not finite in float16" in summary.set_aside[0].reason
    with pytest.raises(UserError, match="has no clips"):
        LatentCache(tmp_path / "cache")


def test_another_vae_or_transform_is_refused_naming_the_field(videos: Path, tmp_path: Path) -> None:
    vae, other, cache = tiny_vae(), tiny_vae(1), tmp_path / "cache"
    build_cache(videos, cache, vae, **SETTINGS)
    before = read_files(cache)
    with pytest.raises(UserError, match=r"vae\.weights: \w+ in the cache, \w+ now\)"):
        build_cache(videos, cache, other, **SETTINGS)
    with pytest.raises(UserError, match=r"dtype: float16 .*, float32 now; transform.sizes: \[\(16, 16\)\] in"):
        build_cache(videos, cache, vae, **SETTINGS | {"sizes": [(24, 24)], "dtype": "float32"})
    with pytest.raises(UserError, match=r"transform\.frame_rate: 8\.0 in the cache, 4.0 now"):
        build_cache(videos, cache, vae, frame_rate=4.0, **SETTINGS)
    with pytest.raises(UserError, match=r"vae\.weights: \w+ in the cache, \w+ now\)"):
        LatentCache(cache, other)
    clipwise = tiny_vae(norm="clip")
    clipwise.load_state_dict(vae.state_dict())
    with pytest.raises(UserError, match=r"\(vae.config.norm: default in the cache, clip now\)"):
        LatentCache(cache, clipwise)
    with pytest.raises(UserError, match=r"\(transform.frame_rate: 8.0 in the cache, 24.0 now\)"):
        LatentCache(cache, vae, {"frame_rate": 24.0, "sizes": [(16, 16)]})
    assert read_files(cache) == before


def test_invalid_arguments_leave_no_files(videos: Path, tmp_path: Path) -> None:
    vae, cache = tiny_vae(), tmp_path / "cache"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        build_cache(tmp_path / "none", cache, vae, **SETTINGS)
    with pytest.raises(UserError, match="nearest are 5 and 9"):
        build_cache(videos, cache, vae, **SETTINGS | {"frames": [6]})
    with pytest.raises(UserError, match="nearest is 16x16"):
        build_cache(videos, cache, vae, **SETTINGS | {"sizes": [(17, 16)]})
    with pytest.raises(UserError, match="dtype = 'int8'"):
        build_cache(videos, cache, vae, dtype="int8", **SETTINGS)  # type: ignore[arg-type]
    assert not cache.exists()
    with pytest.raises(UserError, match="is not a latent cache"):
        build_cache(videos, videos, vae, **SETTINGS)


def test_a_full_disk(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write of a build: committed shards stay, no temporary file does, and the next build continues."""
    vae, cache, fsync = tiny_vae(), tmp_path / "cache", os.fsync
    build_cache(videos, tmp_path / "whole", vae, **SETTINGS)
    shards: list[int] = []
    for successes in (2, 0, 1, 2, 3):  # first a record of the files, the header, the plan; then shard by shard
        left = iter([True] * successes)

        def full(descriptor: int, left: Iterator[bool] = left) -> None:
            if not next(left, False):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(files.os, "fsync", full)
            build_cache(videos, cache, vae, **SETTINGS)
        shards.append(len(list(cache.glob("partitions/00000/[0-9]*.parquet"))))
        assert not (cache / "work").exists() and not list(cache.rglob(".*"))
    assert shards == sorted(shards) and 0 in shards and max(shards) in (1, 2)
    build_cache(videos, cache, vae, **SETTINGS)
    assert read_files(cache) == read_files(tmp_path / "whole")


def test_damaged_caches_are_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a latent cache"):
        LatentCache(tmp_path)
    cache = tmp_path / "cache"
    build_cache(videos, cache, tiny_vae(), **SETTINGS)
    header = cache / "header.json"
    good = json.loads(header.read_text())
    for change, message in [({"version": 1}, "format version 1, and this program reads version 5"),
                            ({"format": "x"}, "not the header of a latent cache"),
                            ({"dtype": "int4"}, "is damaged: dtype"), ({"surplus": 1}, "is damaged: surplus")]:
        header.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            LatentCache(cache)
    header.write_text(json.dumps(good))
    shard = sorted(cache.glob("partitions/00000/*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        LatentCache(cache).entry(0)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        LatentCache(cache)
    assert len(verify(cache, repair=True).faults) == 1
    assert build_cache(videos, cache, tiny_vae(), **SHAPE).done == 4  # as the message says: only its clips
    assert len(LatentCache(cache)) == 12 and not verify(cache).faults
    index = cache / "partitions/00000/index.parquet"
    index.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"index\.parquet is damaged"):
        LatentCache(cache)
    index.unlink()
    assert build_cache(videos, cache, tiny_vae(), **SHAPE).done == len(LatentCache(cache)) == 12


def test_shards_are_bounded_in_bytes(videos: Path, tmp_path: Path) -> None:
    build_cache(videos, tmp_path / "cache", tiny_vae(latent_channels=64),
                **SETTINGS | {"shard_clips": 100, "sizes": [(128, 128)], "dtype": "float32", "shard_mb": 1})
    sizes = [path.stat().st_size for path in (tmp_path / "cache/partitions/00000").glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 1.01e6  # 11 clips of 131 kB, and a photo


def test_default_config_values_do_not_change_the_fingerprint(vae_folder):
    """So that caches stay valid when later versions add options."""
    vae = AutoencoderKLODVAE.from_pretrained(vae_folder)
    spelt, other = (AutoencoderKLODVAE.from_config({**vae.config, "norm": norm}) for norm in ("frame", "clip"))
    for model in (spelt, other):
        model.load_state_dict(vae.state_dict())
    assert vae_fingerprint(spelt) == vae_fingerprint(vae) != vae_fingerprint(other)


def test_files_that_change_during_a_build_are_set_aside(
        source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, encode = tiny_vae(), Executor.encode
    changed = ["clip_5.mp4", "photo.png"]

    def meanwhile(self: Executor, units: Iterable[EncodeUnit]) -> Any:
        def planned() -> Iterator[EncodeUnit]:
            for k, unit in enumerate(units):
                if k == 0:
                    shutil.copy(source / "clip_6.mp4", source / "clip_5.mp4")
                    shutil.copy(source / "photo.png", tmp_path / "before.png")
                    Image.new("RGB", (30, 20), "red").save(source / "photo.png")
                    os.utime(source / "clip_7.mp4")  # touched: the same bytes
                yield unit

        return encode(self, planned())

    monkeypatch.setattr(Executor, "encode", meanwhile)
    summary = build_cache(source, tmp_path / "cache", vae, **SETTINGS)
    assert sorted((entry.path, entry.kind) for entry in summary.set_aside) == [(name, "changed") for name in changed]
    monkeypatch.setattr(Executor, "encode", encode)
    summary = build_cache(source, tmp_path / "cache", vae, **SETTINGS)
    assert (summary.done, summary.duplicates, summary.set_aside) == (1, 1, [])  # the photo; clip_5 is clip_6 now
    shutil.copy(tmp_path / "before.png", source / "photo.png")
    summary = build_cache(source, tmp_path / "cache", vae, **SETTINGS)  # what it was before
    assert (summary.done, summary.set_aside) == (1, [])
