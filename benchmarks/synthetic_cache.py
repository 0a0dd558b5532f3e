"""A synthetic latent cache: an index of many clips, whose tensors are sparse files that nothing reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from odvae.cache import format as fmt
from odvae.cache.moments import Moments
from odvae.cache.partition import CommittedShard, Partition, Shard, tensors_of, write_partition
from odvae.utils.storage import LocalStorage

SHARDS = 1200  # of a million clips
CLIPS_A_PARTITION = 16384
WORDS = ["a", "the", "man", "woman", "child", "dog", "red", "old", "small", "two", "street", "river", "kitchen",
         "walks", "runs", "sits", "holds", "looks", "under", "near", "slowly", "camera", "light", "evening",
         "window", "table", "water", "grass", "through", "towards", "behind", "and", "of", "with"]
# The buckets of an index's clips, in turn: two lengths and photos, each wide, high and square.
BUCKETS = [(frames, height, width) for frames in (1, 17, 33) for height, width in ((256, 448), (448, 256), (320, 320))]


def header() -> fmt.Header:
    vae = fmt.VaeHeader(fingerprint="0" * 64, weights="0" * 64, kind="none", config={}, latent_channels=4,
                        temporal_compression_ratio=4, spatial_compression_ratio=8, precision="float32")
    return fmt.Header(vae=vae, transform=fmt.TransformHeader(frame_rate=8.0, frames=[17, 33], sizes=[(320, 320)]),
                      stored="mean", dtype="float16", made_with={})


def make_shard(cache: Path, number: int, name: str, clips: list[tuple[int, int, int]],
               shapes: list[tuple[int, int, int, int]], rng: np.random.Generator, first: int,
               ids: list[str] | None = None, size: int = 0) -> CommittedShard:
    """Make the rows of a shard and, unless tensors of these IDs and this size exist, write a sparse file for them."""
    n = len(clips)
    hashes = [rng.bytes(n * 32).hex() for _ in range(4)]

    def digests(k: int, length: int) -> list[str]:
        return [hashes[k][64 * i : 64 * i + length] for i in range(n)]

    words = rng.integers(0, len(WORDS), (n, 11)).tolist()
    frames, height, width = map(list, zip(*clips, strict=True))
    flat = pa.array(np.array(shapes, np.int32).ravel())
    columns = {
        "id": ids or digests(0, 32),
        "path": [f"collection/part_{first // 10000:03d}/video_{first + i:08d}.mp4" for i in range(n)],
        "content": digests(1, 64), "start": np.repeat(np.arange((n + 3) // 4), 4)[:n] * 4.125,
        "seconds": [f / 8 if f > 1 else 0.0 for f in frames], "frames": frames, "frame_rate": [8.0] * n,
        "height": height, "width": width, "bucket": [fmt.bucket_name(*clip) for clip in clips],
        "captions": [[" ".join(WORDS[k] for k in some)] for some in words],
        "caption_hashes": [[one] for one in digests(2, 32)],
        "caption_from_name": [False] * n, "dtype": ["float16"] * n,
        "shape": pa.FixedSizeListArray.from_arrays(flat, 4), "checksum": digests(3, 64),
        **{key: rng.random(n, np.float32) for key in ("brightness", "contrast", "sharpness", "motion")},
        "psnr": [31.5] + [None] * (n - 1)}
    if ids is None:
        size = sum(2 * c * t * h * w for c, t, h, w in shapes) + 100 * n
        tensors = cache / tensors_of(number, name)
        tensors.parent.mkdir(parents=True, exist_ok=True)
        with tensors.open("wb") as file:
            file.truncate(size)
    return CommittedShard(Shard(name, n, size, Moments(10**6, np.zeros(4), np.full(4, 1e6))),
                          pa.table(columns, schema=fmt.SCHEMA), ())


def write_index(cache: Path, number: int, shards: Sequence[CommittedShard]) -> None:
    write_partition(LocalStorage(cache), Partition(number, uncommitted=tuple(shards)).with_uncommitted())


def write_cache(cache: Path, clips: int) -> None:
    partitions = 1 << max(0, (clips - 1) // CLIPS_A_PARTITION).bit_length()
    fmt.write_header(LocalStorage(cache), header().model_copy(update={"partitions": partitions}))
    rng = np.random.default_rng(0)
    shards = max(partitions, round(clips * SHARDS / 1e6))
    borders = np.linspace(0, clips, shards + 1).astype(int).tolist()
    by_partition: dict[int, list[CommittedShard]] = {}
    for k, (first, last) in enumerate(pairwise(borders)):
        some = [BUCKETS[b] for b in rng.integers(0, len(BUCKETS), last - first)]
        shapes = [(4, 1 + (f - 1) // 4, h // 8, w // 8) for f, h, w in some]
        number = k * partitions // shards
        by_partition.setdefault(number, []).append(
            make_shard(cache, number, f"{k:05d}-{k:016x}", some, shapes, rng, first))
    for number, members in by_partition.items():
        write_index(cache, number, members)
