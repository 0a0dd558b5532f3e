"""How fast is a latent cache: to open with a million clips, to read at random, to train from? On synthetic data.

opening   an index of --clips clips, each time in a new process, whose peak memory is reported above that of a process
          that only imports. The tensors of the shards are sparse files that nothing reads.
reading   --mb of latents of 295 kB, copied one by one into one buffer, in random order, all from the page cache:
          through `LatentCache.entry`, by plain slices of numpy memory maps at the same offsets of the same files, from
          one .pt file per clip, and from WebDataset tars (in order: a tar has no random access).
waiting   a loop over `BucketBatches` and a DataLoader with a step that computes 50 ms on one thread: the share of time
          it waits for data.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from common import interleaved, record, table
from safetensors.torch import save
from torch.utils.data import DataLoader, default_collate

from odvae.cache import BucketBatches, LatentCache, LatentDataset
from odvae.cache import format as fmt
from odvae.cache.moments import Moments
from odvae.cache.partition import (
    CommittedShard,
    Partition,
    Shard,
    folder_of,
    read_partition,
    tensors_of,
    write_partition,
)
from odvae.trainer.trainer import prefetch
from odvae.utils.storage import LocalStorage

SHARDS = 1200  # of a million clips
CLIPS_A_PARTITION = 16384
AHEAD = "a thread ahead, as our trainers"
WORDS = ["a", "the", "man", "woman", "child", "dog", "red", "old", "small", "two", "street", "river", "kitchen",
         "walks", "runs", "sits", "holds", "looks", "under", "near", "slowly", "camera", "light", "evening",
         "window", "table", "water", "grass", "through", "towards", "behind", "and", "of", "with"]
# The buckets of an index's clips, in turn: two lengths and photos, each wide, high and square.
BUCKETS = [(frames, height, width) for frames in (1, 17, 33) for height, width in ((256, 448), (448, 256), (320, 320))]
SHAPES = [(4, 9, 64, 64), (4, 9, 32, 128)]  # of the latents to read: 33 frames of 512x512 or 256x1024 pixels
STEP, STEPS, BATCH = .05, 150, 8
TARGETS = {"seconds": 2.0, "MB": 1000, "ratio": .8, "waiting %": 1.0}


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


# ---- opening


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


def open_once(cache: str | None, everything: bool) -> None:
    """Print [seconds to open, CPU seconds of that, seconds for texts, peak MB] as JSON, in a process of its own."""
    began, opened, cpu, texts = time.perf_counter(), 0.0, time.process_time(), 0.0
    if cache:
        found = LatentCache(cache)
        BucketBatches(LatentDataset(found).buckets(), 8).batch(0)
        opened, cpu = time.perf_counter() - began, time.process_time() - cpu
        if everything:  # what the first item also reads
            began = time.perf_counter()
            _ = found.ids, found.captions
            texts = time.perf_counter() - began
    # VmHWM, not ru_maxrss, which includes the peak of the parent process.
    status = Path("/proc/self/status").read_text()
    print(json.dumps([opened, cpu, texts, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6]))


def opening(folder: Path, clips: int) -> dict[str, float]:
    write_cache(folder / "index", clips)

    def fresh(*arguments: str) -> list[float]:
        out = subprocess.run([sys.executable, __file__, "--once", *arguments], capture_output=True, text=True,
                             check=True)
        found: list[float] = json.loads(out.stdout)
        return found

    cache = str(folder / "index")
    runs = [(fresh(), fresh(cache), fresh(cache, "texts")) for _ in range(3)]
    opened, cpu = (median([some[k] for _, *two in runs for some in two]) for k in (0, 1))
    peak, with_texts = (median([run[k][3] - run[0][3] for run in runs]) for k in (1, 2))
    texts = median([run[2][2] for run in runs])
    table(["opening", "clips", "measured", "wanted"],
          [["seconds to the first batch", clips, opened, f"< {TARGETS['seconds']}"],
           ["CPU seconds of these", clips, cpu, ""],
           ["MB above imports", clips, peak, f"< {TARGETS['MB']}"],
           ["seconds for ids and captions", clips, texts, ""],
           ["MB above imports, with these", clips, with_texts, ""]])
    return {"clips": clips, "seconds": opened, "CPU seconds": cpu, "MB": peak, "texts seconds": texts,
            "MB with texts": with_texts}


# ---- reading


def write_latents(folder: Path, mb: int) -> int:
    """Write the same latents three times; returns their number."""
    fmt.write_header(LocalStorage(folder / "cache"), header())
    (folder / "cache" / folder_of(0)).mkdir(parents=True)
    written: list[CommittedShard] = []
    values = int(np.prod(SHAPES[0]))
    clips, a_shard = max(16, mb * 10**6 // (2 * values)), 64 * 10**6 // (2 * values)
    base = torch.randn(values + clips, generator=torch.Generator().manual_seed(0)).half()
    rng = np.random.default_rng(0)
    (folder / "pt").mkdir()
    for shard, first in enumerate(range(0, clips, a_shard)):
        numbers = range(first, min(first + a_shard, clips))
        shapes = [SHAPES[i % 2] for i in numbers]
        latents = [base[i : i + values].view(shape).clone() for i, shape in zip(numbers, shapes, strict=True)]
        name = f"{shard:05d}-{shard:016x}"
        ids = [f"{i:032x}" for i in numbers]
        data = save(dict(zip(ids, latents, strict=True)))
        (folder / "cache" / tensors_of(0, name)).write_bytes(data)
        sizes = [(33, h * 8, w * 8) for _, _, h, w in shapes]
        written.append(make_shard(folder / "cache", 0, name, sizes, shapes, rng, first, ids, len(data)))
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, latent in zip(numbers, latents, strict=True):
                torch.save(latent, folder / "pt" / f"{i}.pt")
                npy = io.BytesIO()
                np.save(npy, latent.numpy())
                info = tarfile.TarInfo(f"{i:08d}.npy")
                info.size = npy.tell()
                npy.seek(0)
                tar.addfile(info, npy)
    write_index(folder / "cache", 0, written)
    return clips


def plain_places(cache: LatentCache) -> list[tuple[np.ndarray, int, int]]:
    """Return (memory map, first byte, last byte) of every latent in the cache's order, without the reader."""
    found = []
    for shard, rows in read_partition(LocalStorage(cache.path), 0).tables():
        tensors = cache.path / tensors_of(0, shard.name)
        with tensors.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        flat = np.asarray(np.memmap(tensors, np.uint8, "r"))  # slices of a memmap itself cost 2 us more
        for key in rows["id"].to_pylist():
            first, last = (8 + length + place for place in header[key]["data_offsets"])
            found.append((flat, first, last))
    return found


def reading(folder: Path, clips: int) -> dict[str, float]:
    cache = LatentCache(folder / "cache")
    values = int(np.prod(SHAPES[0]))
    buffer = np.empty(values, np.float16)
    order = np.random.default_rng(1).permutation(clips).tolist()
    places = plain_places(cache)

    def plain() -> None:
        for i in order:
            flat, first, last = places[i]
            np.copyto(buffer, flat[first:last].view(np.float16))

    def ours() -> None:
        for i in order:
            np.copyto(buffer, cache.entry(i).numpy().reshape(-1))

    def files() -> None:
        for i in order:
            latent = torch.load(folder / "pt" / f"{i}.pt", weights_only=True)
            np.copyto(buffer, latent.numpy().reshape(-1))

    for i in order[:20]:
        flat, first, last = places[i]
        assert np.array_equal(flat[first:last].view(np.float16), cache.entry(i).numpy().reshape(-1))
    calls: dict[str, Callable[[], object]] = {"plain numpy maps": plain, "LatentCache.entry": ours,
                                              "a .pt file a clip": files}
    if importlib.util.find_spec("webdataset"):
        import webdataset

        def tars() -> None:
            urls = sorted(map(str, folder.glob("*.tar")))
            for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
                np.copyto(buffer, sample["npy"].reshape(-1))

        calls["WebDataset, in order"] = tars
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> Callable[[], None]:
        def call() -> None:
            began = time.process_time()
            calls[name]()
            cpu[name].append(time.process_time() - began)

        return call

    seconds = interleaved({name: timed(name) for name in calls})
    # Everything is read from memory, so CPU time measures the same, also on a machine that is not idle.
    busy = {name: median(times[1:]) for name, times in cpu.items()}
    speed = {name: 2 * values * clips / took / 1e9 for name, took in seconds.items()}
    ratio = {name: gbs / speed["plain numpy maps"] for name, gbs in speed.items()}
    print()
    table(["reading", "latents", "GB/s", "us a latent", "CPU us", "of plain", "of plain, CPU", "wanted"],
          [[name, clips, speed[name], seconds[name] / clips * 1e6, busy[name] / clips * 1e6, ratio[name],
            busy["plain numpy maps"] / busy[name],
            f"> {TARGETS['ratio']}" if name == "LatentCache.entry" else ""] for name in calls])
    return {"latents": clips, **{f"{name} GB/s": gbs for name, gbs in speed.items()},
            "ratio": ratio["LatentCache.entry"],
            "ratio in CPU time": busy["plain numpy maps"] / busy["LatentCache.entry"]}


# ---- waiting


def waiting(folder: Path) -> dict[str, float]:
    dataset = LatentDataset(LatentCache(folder / "cache"))
    weights = torch.randn(1024, 1024)

    def compute() -> None:
        end = time.perf_counter() + STEP
        while time.perf_counter() < end:
            weights @ weights

    def batches(workers: int | str) -> Iterator[object]:
        sampler = BucketBatches(dataset.buckets(), BATCH, steps=STEPS + 5)
        if workers == AHEAD:
            return prefetch(lambda step: [default_collate([dataset[pick] for pick in sampler.batch(step)])], 0,
                            STEPS + 5)
        return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=int(workers)))

    rows: list[list[float | str]] = []
    figures: dict[str, float] = {}
    for workers in (AHEAD, 0, 1):
        began = time.perf_counter()
        loader = batches(workers)
        next(loader)
        first = time.perf_counter() - began
        waits: list[float] = []
        for step in range(STEPS + 4):
            if step == 4:  # measure from here on
                waits, began = [], time.perf_counter()
            asked = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - asked)
            compute()
        part = 100 * sum(waits) / (time.perf_counter() - began)
        rows.append([workers, BATCH, median(waits) * 1e3, max(waits) * 1e3, first * 1e3, part,
                     f"< {TARGETS['waiting %']}"])
        figures |= {f"waiting %, {workers}": part, f"median wait ms, {workers}": median(waits) * 1e3}
    print()
    table(["waiting; workers", "batch", "median ms", "longest ms", "first batch ms", "% of time", "wanted"], rows)
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--once"]:
        open_once(sys.argv[2] if len(sys.argv) > 2 else None, len(sys.argv) > 3)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000, help="of the index that is opened (%(default)s)")
    parser.add_argument("--mb", type=int, default=1500, help="of latents that are read; the disk takes three times "
                                                             "that (%(default)s)")
    parser.add_argument("--folder", help="where the data is written, and removed again (the system's)")
    parser.add_argument("--parts", nargs="+", choices=["opening", "reading", "waiting"],
                        default=["opening", "reading", "waiting"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the step stands for one on an accelerator: the other cores are for the workers
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if "opening" in arguments.parts:
            figures["opening"] = opening(folder, arguments.clips)
        if {"reading", "waiting"} & set(arguments.parts):
            clips = write_latents(folder, arguments.mb)
        if "reading" in arguments.parts:
            figures["reading"] = reading(folder, clips)
        if "waiting" in arguments.parts:
            figures["waiting"] = waiting(folder)
    record("latent cache: opening, reading, waiting", {"clips": arguments.clips, "mb": arguments.mb, "batch": BATCH,
                                                       "step seconds": STEP, "wanted": TARGETS}, figures)


if __name__ == "__main__":
    main()
