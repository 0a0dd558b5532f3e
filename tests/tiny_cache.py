"""What the tests of latent caches build from: videos of noise, a tiny VAE, a build's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import numpy as np
import torch
from PIL import Image

from odvae.cache import LatentCache
from odvae.data.video.reader import write_video
from odvae.model.autoencoder import AutoencoderKLODVAE

SHAPE: dict[str, Any] = {"frames": [5], "sizes": [(16, 16)], "batch": 2, "workers": 1}
NUMBERED, SMALL_SHARDS = 14, SHAPE | {"shard_clips": 3, "psnr_clips": 0}  # the clips and settings of `partitioned`


def tiny_vae(seed: int = 0, **config: Any) -> AutoencoderKLODVAE:
    """A VAE smaller than `builders.tiny_vae`: a cache's tests encode many clips and look at no picture."""
    return builders.tiny_vae(seed, **{"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2} | config)


def write_noise(path: Path, seed: int = 0, frames: int = 5, size: tuple[int, int] = (16, 16)) -> Path:
    """Write a video of noise in blocks of 4x4 pixels, 8 frames a second; each seed gives another content."""
    blocks = np.random.default_rng(seed).integers(0, 255, (frames, size[0] // 4, size[1] // 4, 3), np.uint8)
    write_video(path, [blocks.repeat(4, 1).repeat(4, 2)], 8.0)
    return path


def write_noise_photo(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    Image.fromarray(np.random.default_rng(99).integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


def latents_by_id(cache: Path) -> dict[str, torch.Tensor]:
    opened = LatentCache(cache)
    return {name: opened.stored(i).clone() for i, name in enumerate(opened.ids)}


def read_files(folder: Path) -> dict[str, bytes]:
    """Without the reports of builds, which hold times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith("build-report")}
