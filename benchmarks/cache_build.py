"""How close is a cache build to the rate of the encoder alone? The same clips through the encoder, from memory, and
through a whole build from files: listing, hashing, probing, decoding, encoding, checksums, writing.

    python benchmarks/cache_build.py [--clips 96] [--vae odvae/weights/natural] [--size 128]
    python benchmarks/cache_build.py --ray [--clips 96] [--runs 5]      # actors of Ray, one a core, against one process

The sources are rendered clips of 33 frames at 256x256 in H.264. Target: .9 on two cores, .95 on a GPU; Ray .9 of the
local build. Ray is compared by the time from the first plan to the last commit: its actors start once, in seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import interleaved, record, table

from odvae.cache import build_cache
from odvae.data.synthetic import write_rendered
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import read_clip
from odvae.inference.adapters import load_autoencoder
from odvae.trainer.distributed import local_device
from odvae.weights import NATURAL_VAE

FRAMES, BATCH = 33, 8


def compare_ray(args: argparse.Namespace) -> None:
    """Compare the clips a second of both executors; shards of a batch, so that each actor has several."""
    rates: dict[str, list[float]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "videos"
        write_rendered(source, args.clips, frames=FRAMES, size=256)

        def build(on: str) -> None:
            cache = Path(folder) / f"cache-{on}-{len(rates[on])}"
            summary = build_cache(source, cache, load_autoencoder(args.vae).model.to(local_device()), frames=[FRAMES],
                                  batch=BATCH, sizes=[(args.size, args.size)], psnr_clips=0, shard_clips=BATCH, on=on)
            assert summary.done == args.clips
            rates[on].append(summary.done / summary.encode_seconds)

        interleaved({on: partial(build, on) for on in rates}, runs=args.runs)
        torch.set_num_threads(1)  # as an actor with one CPU: the bytes depend on it
        build("local")
        single = Path(folder) / f"cache-local-{len(rates['local']) - 1}"
        same = shards(single) == shards(Path(folder) / "cache-ray-0")
        rates["local"].pop()
    ratios = [ray / local for local, ray in zip(rates["local"][-args.runs:], rates["ray"][-args.runs:], strict=True)]
    table(["", "clips per second"], [[on, statistics.median(values[-args.runs:])] for on, values in rates.items()])
    print(f"Ray against local, median of {args.runs} interleaved runs: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f}); the same bytes: {same}; load {os.getloadavg()[1]:.1f}")
    record("cache_build_ray", {"clips": args.clips, "frames": FRAMES, "size": args.size, "vae": args.vae},
           {"clips_per_second": {on: statistics.median(values[-args.runs:]) for on, values in rates.items()},
            "ratios": ratios, "same": same, "load": os.getloadavg()[1]})


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--vae", default=str(NATURAL_VAE))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ray", action="store_true", help="compare Ray with a local build")
    args = parser.parse_args()
    if args.ray:
        compare_ray(args)
        return
    vae = load_autoencoder(args.vae).model.to(local_device())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "videos"
        paths = write_rendered(source, args.clips, frames=FRAMES, size=256)
        videos = [resize_crop(read_clip(path, 0, FRAMES, 8.0), args.size, args.size) for path in paths]
        builds: list[float] = []

        def bare() -> None:
            with torch.inference_mode():
                for i in range(0, len(videos), BATCH):
                    x = torch.stack([to_tensor(video) for video in videos[i : i + BATCH]]).to(vae.device)
                    vae.encode(x).latent_dist.mean.half().cpu()

        def build() -> None:
            summary = build_cache(source, Path(folder) / f"cache-{len(builds)}", vae, frames=[FRAMES], batch=BATCH,
                                  sizes=[(args.size, args.size)], psnr_clips=0)
            assert summary.done == args.clips
            builds.append(summary.encode_seconds)

        seconds = interleaved({"encoder alone": bare, "whole build": build}, runs=args.runs)
    frames = args.clips * FRAMES
    inner = statistics.median(builds[-args.runs:])  # without the warm-up round
    rows = [[name, f"{value:.1f}", f"{frames / value:.1f}", f"{seconds['encoder alone'] / value:.3f}"]
            for name, value in {**seconds, "of it encoding": inner}.items()]
    table(["", "s", "frames per second", "of the encoder's rate"], rows)
    record("cache_build", {"clips": args.clips, "frames": FRAMES, "size": args.size, "vae": args.vae},
           {"seconds": seconds, "encode_seconds": inner,
            "share": seconds["encoder alone"] / seconds["whole build"]})


if __name__ == "__main__":
    main()
