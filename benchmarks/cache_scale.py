"""What a rank of a training needs of the index of a very large cache at a URL: time and memory, by the number of clips,
and the line to 100 million.

    python benchmarks/cache_scale.py [--clips 1000000 2000000 4000000]

Each time in a new process: open the cache, hold out 64 clips by file, put the windows at the starts of clips and inside
them into buckets, draw the clips of a step. The cache is read by fsspec, at file://, as from an object store. All its
partitions have the same 16384 rows, of other files; its shards of 820 clips are sparse files that nothing reads. Memory
is the peak above that of a process that only imports. Target: 100 million clips under 2 GB, in 60 s on 16 cores.

    python benchmarks/cache_scale.py --captions 1000000 2000000 4000000

The same for a folder's store of caption embeddings, with its lookup and without: open it, find all captions, as a
training does before its first step, find some. Shards of 2048 captions (32 tokens of 1024 numbers) are sparse files.
Private memory is what each process has for itself: mapped files are the system's, shared, and given back when needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import record, table
from synthetic_cache import BUCKETS, CLIPS_A_PARTITION, header, make_shard, write_index

from lvdm.training.buckets import WindowSpec, hold_out
from odvae.cache import BucketBatches, LatentCache, LatentDataset
from odvae.cache import format as fmt
from odvae.cache.embed import SHARDS_A_FOLDER
from odvae.cache.partition import folder_of, parquet_bytes, read_partition, write_partition
from odvae.cache.text import ENCODER, SCHEMA, TextStore
from odvae.cache.text_lookup import LOOKUP
from odvae.utils.storage import LocalStorage

SHARDS = 20  # a partition
GOAL = 100_000_000  # clips
TEXTS_A_SHARD = 2048
REQUESTS = 3  # for a partition: its listing, the last 64 KiB of its index with the metadata, a column


def write_partitions(cache: Path, count: int) -> None:
    """Add partitions up to `count`."""
    fmt.write_header(LocalStorage(cache), header().model_copy(update={"partitions": 1 << (count - 1).bit_length()}))
    first, storage = cache / folder_of(0), LocalStorage(cache)
    if not first.exists():
        rng, shards = np.random.default_rng(0), []
        size = CLIPS_A_PARTITION // SHARDS
        for k in range(SHARDS):
            clips = [BUCKETS[b] for b in rng.integers(0, len(BUCKETS), size + (k < CLIPS_A_PARTITION % SHARDS))]
            shapes = [(4, 1 + (f - 1) // 4, h // 8, w // 8) for f, h, w in clips]
            shards.append(make_shard(cache, 0, f"{k:05d}-{k:016x}", clips, shapes, rng, k * size))
        write_index(cache, 0, shards)
    partition = read_partition(storage, 0)
    column = partition.table.schema.get_field_index("content")
    for number in range(1, count):
        folder = cache / folder_of(number)
        if not folder.exists():
            folder.mkdir()
            for path in first.glob("*.safetensors"):
                os.link(path, folder / path.name)
            files = pa.array([hashlib.sha256(f"{number} {k // 4}".encode()).hexdigest()
                              for k in range(CLIPS_A_PARTITION)])
            table = partition.table.set_column(column, "content", files)
            write_partition(storage, replace(partition, number=number, generation=0, table=table))


def open_once(url: str | None) -> None:
    """Print [seconds, CPU seconds, peak MB] as JSON."""
    began, busy = time.perf_counter(), time.process_time()
    if url:
        cache = LatentCache(url)
        dataset = LatentDataset(cache, normalise=False)
        held = hold_out([cache], 64)
        buckets = WindowSpec(3, 5, 2).buckets(dataset, held)
        rows = [{bucket.name: bucket.clips for bucket in buckets if bucket.mid_clip == mid} for mid in (False, True)]
        BucketBatches(rows, 8).batch(0)
    took, busy = time.perf_counter() - began, time.process_time() - busy
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps([took, busy, peak]))


def write_texts(folder: Path, captions: int) -> None:
    """Add shards up to that many captions, and write the lookup."""
    storage = LocalStorage(folder)
    storage.write(ENCODER, json.dumps({"fingerprint": "0" * 64, "name": "none", "dim": 1024}).encode())
    for number in range(captions // TEXTS_A_SHARD):
        name = f"{number // SHARDS_A_FOLDER:05d}/" * (number >= SHARDS_A_FOLDER) + f"{number:016x}"
        if storage.exists(f"{name}.parquet"):
            continue
        raw = np.random.default_rng(number).bytes(48 * TEXTS_A_SHARD).hex()
        hashes = [raw[i : i + 32] for i in range(0, 32 * TEXTS_A_SHARD, 32)]
        rows = pa.table([hashes, [f"caption {text}" for text in hashes], [32] * TEXTS_A_SHARD,
                         [raw[i : i + 64] for i in range(0, 64 * TEXTS_A_SHARD, 64)]], schema=SCHEMA)
        size = TEXTS_A_SHARD * 2**16
        storage.write(f"{name}.safetensors", b"")
        os.truncate(folder / f"{name}.safetensors", size)
        storage.write(f"{name}.parquet", parquet_bytes(rows, {"bytes": size}))
    TextStore(storage).update_lookup()


def open_texts(folder: str | None, captions: int = 0) -> None:
    """Print [seconds and CPU seconds to open, CPU seconds to find all captions, us to find one, private MB] as JSON."""
    began, busy, found, one = time.perf_counter(), time.process_time(), 0.0, 0.0
    took = spent = 0.0
    if folder:
        store = TextStore(folder)
        took, spent = time.perf_counter() - began, time.process_time() - busy
        for number in range(captions // TEXTS_A_SHARD):  # generated as they were written
            raw = np.random.default_rng(number).bytes(48 * TEXTS_A_SHARD)
            keys = np.frombuffer(raw[: 16 * TEXTS_A_SHARD], ">u8")[::2].astype(np.uint64)
            began_here = time.process_time()
            assert store.has(keys).all()
            found += time.process_time() - began_here
        assert not store.has(keys + np.uint64(1)).any()
        began_here = time.process_time()
        for key in keys[:1000]:
            store.has(np.array([key]))
        one = (time.process_time() - began_here) * 1e3
    private = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e6
    print(json.dumps([took, spent, found, one, private]))


def measure_texts(counts: Sequence[int]) -> None:
    imports, rows = fresh("texts")[-1], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in sorted(counts):
            count -= count % TEXTS_A_SHARD
            write_texts(folder, count)
            for with_lookup in (True, False):
                if not with_lookup:
                    os.rename(folder / LOOKUP, folder / "hidden")
                *figures, private = fresh("texts", name, str(count))
                rows.append(["with" if with_lookup else "without", count, *figures, private - imports])
            os.rename(folder / "hidden", folder / LOOKUP)
    heads = ["seconds to open", "CPU s", "CPU s to find all", "us to find one", "private MB above imports"]
    at_goal = [[kind, f"{GOAL} (line)", *(float(np.polyval(np.polyfit(
        [row[1] for row in mine], [row[k] for row in mine], 1), GOAL)) for k in range(2, 7))]
        for kind in ("with", "without") for mine in [[row for row in rows if row[0] == kind]]]
    table(["lookup", "captions", *heads], [*rows, *at_goal])
    record("cache_scale, captions", {"captions": list(counts), "goal": GOAL},
           [dict(zip(["lookup", "captions", *heads], row, strict=True)) for row in [*rows, *at_goal]])


def fresh(*arguments: str) -> list[float]:
    command = [sys.executable, __file__, "--once", *arguments]
    found: list[float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        if sys.argv[2:3] == ["texts"]:
            open_texts(sys.argv[3] if len(sys.argv) > 3 else None, *map(int, sys.argv[4:]))
        else:
            open_once(sys.argv[2] if len(sys.argv) > 2 else None)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[1_000_000, 2_000_000, 4_000_000])
    parser.add_argument("--captions", type=int, nargs="+", help="of a store of embeddings, instead of clips")
    arguments = parser.parse_args()
    if arguments.captions:
        measure_texts(arguments.captions)
        return
    imports, rows = fresh()[2], []
    with tempfile.TemporaryDirectory() as name:
        for clips in sorted(arguments.clips):
            partitions = -(-clips // CLIPS_A_PARTITION)
            write_partitions(Path(name), partitions)
            seconds, cpu, peak = fresh(f"file://{name}")
            rows.append([partitions * CLIPS_A_PARTITION, seconds, cpu, peak - imports])
    counts = [row[0] for row in rows]
    at_goal = [float(np.polyval(np.polyfit(counts, [row[k] for row in rows], 1), GOAL)) for k in (1, 2, 3)]
    table(["clips", "seconds", "CPU seconds", "MB above imports"], [*rows, [f"{GOAL} (line)", *at_goal]])
    print(f"and {GOAL // CLIPS_A_PARTITION * REQUESTS} requests, besides some 64 partitions for held-out clips")
    record("cache_scale", {"clips": counts, "goal": GOAL},
           {"rows": rows, "at the goal": dict(zip(("seconds", "CPU seconds", "MB"), at_goal, strict=True))})


if __name__ == "__main__":
    main()
