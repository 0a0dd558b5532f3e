"""How close is a cache build to the rate of the encoder alone? The same clips through the encoder, from memory, and
through a whole build from files: listing, hashing, probing, decoding, encoding, checksums, writing.

    python benchmarks/cache_build.py [--clips 96] [--vae odvae/weights/natural] [--size 128]

The sources are rendered clips of 33 frames at 256x256 in H.264. Target: .9 on two cores, .95 on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--vae", default=str(NATURAL_VAE))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
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
