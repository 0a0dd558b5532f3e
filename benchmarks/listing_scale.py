"""What does a build cost that has nothing to decode? A manifest of remote files, of which only paths and sizes exist,
is listed and planned: all new, then nothing to do, then 1 % new. Each in a process of its own, for its peak of memory.

    python benchmarks/listing_scale.py [--rows 1000000] [--folder FOLDER]
    python benchmarks/listing_scale.py --files 20000      # local files with captions beside them, instead

Target: CPU seconds linear in the rows, under 2 GB a process at 10 M rows; under 10 CPU s for 20,000 files where
there is nothing to do.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from common import record, table
from fsspec.spec import AbstractFileSystem

from odvae.cache import build_cache
from odvae.cache import format as fmt
from odvae.cache.build import builder
from odvae.cache.build.decode_worker import MediaInfo
from odvae.cache.build.shard_encoder import EncodeUnit
from odvae.cache.partition import CommittedShard, Shard, write_shard
from odvae.data.sources import MediaRef
from odvae.inference.adapters import load_autoencoder
from odvae.weights import DEMO_VAE

GROUP = 2**16  # rows that are written at once


class SyntheticFiles(AbstractFileSystem):
    """Files of which there are only names and sizes. Counts the requests for them."""

    protocol, requests = "synthetic", 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        SyntheticFiles.requests += 1
        return {"name": path, "size": 1_000_000, "type": "file", "ETag": path}


class SyntheticExecutor:
    """Probes and encodes nothing."""

    has_lost, usage, encoders, decoders = False, dict[str, float](), 1, 1

    def __init__(self, encoder: Any, storage: Any, *_: Any) -> None:
        self.storage, self.frames = storage, dict[str, int]()

    def __enter__(self) -> SyntheticExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def probe(self, refs: Sequence[MediaRef]) -> Iterator[MediaInfo]:
        for ref in refs:
            yield MediaInfo(hashlib.sha256(ref.path.encode()).hexdigest(), 64, 64, 48, 5.0)

    def encode(self, units: Iterable[EncodeUnit]) -> Iterator[tuple[EncodeUnit, CommittedShard]]:
        for unit in units:
            rows = [{"id": clip.id, "path": clip.ref.name, "content": clip.content, "start": clip.start,
                     "frames": clip.frames, "height": 64, "width": 64, "bucket": clip.bucket,
                     "captions": list(clip.captions), "caption_hashes": list(map(fmt.caption_hash, clip.captions)),
                     "caption_from_name": clip.caption_from_name} for clip in unit.clips]
            added = CommittedShard(Shard(unit.name, len(rows), 0, None), pa.Table.from_pylist(rows, fmt.SCHEMA), ())
            write_shard(self.storage, unit.partition, unit.generation, added, b"")
            yield unit, added

    def cancel(self) -> None:
        pass


def write_manifest(path: Path, rows: int) -> None:
    schema = pa.schema([("path", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP):
            numbers = range(first, min(first + GROUP, rows))
            writer.write_table(pa.table([[f"synthetic://videos/{n // 1000:06d}/{n:09d}.mp4" for n in numbers],
                                         [f"clip {n} of a synthetic list" for n in numbers]], schema=schema))


def write_files(folder: Path, count: int) -> None:
    for n in range(count):
        path = folder / f"{n // 1000:06d}/{n:09d}.mp4"
        if path.exists():  # it stays unchanged
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
        path.with_suffix(".txt").write_text(f"clip {n} of a folder")


def build(manifest: Path, cache: Path) -> None:
    """Build, and print what it cost."""
    fsspec.register_implementation("synthetic", SyntheticFiles)
    builder.open_executor = SyntheticExecutor
    vae = load_autoencoder(str(DEMO_VAE)).model
    gc.freeze()  # as the command does
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begin, cpu = time.monotonic(), time.process_time()
    summary = build_cache(manifest, cache, vae, psnr_clips=0)
    print(json.dumps({"done": summary.done, "reused": summary.reused, "seconds": time.monotonic() - begin,
                      "cpu_seconds": time.process_time() - cpu, "requests": SyntheticFiles.requests,
                      "gb_before": before, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--files", type=int, nargs="+", help="local ones, instead of rows")
    parser.add_argument("--folder", type=Path, help="for manifests and caches (default: the temporary folder)")
    parser.add_argument("--build", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(*args.build)
        return
    results = []
    for rows in args.files or args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source = Path(folder) / ("files" if args.files else "list.parquet")
            write: Any = write_files if args.files else write_manifest
            for what, count in (("all new", rows), ("nothing to do", rows), ("1 % new", rows + rows // 100)):
                if what != "nothing to do":
                    write(source, count)
                command = [sys.executable, __file__, "--build", str(source), f"{folder}/cache"]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                results.append({"rows": rows, "what": what, **json.loads(output.splitlines()[-1])})
                print(results[-1], flush=True)
    table(["rows", "", "new", "s", "CPU s", "CPU us a row", "HEADs", "GB", "GB before"],
          [[one["rows"], one["what"], one["done"], one["seconds"], one["cpu_seconds"],
            one["cpu_seconds"] / one["rows"] * 1e6, one["requests"], one["gb"], one["gb_before"]] for one in results])
    record("listing_scale", {"rows": args.rows, "files": args.files}, results)


if __name__ == "__main__":
    main()
