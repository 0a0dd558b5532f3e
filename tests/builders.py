"""Small models and videos that several test files build."""

from __future__ import annotations

import torch

from odvae import AutoencoderKLODVAE

WIDTHS = (8, 8, 16, 16)


def tiny_vae(seed: int = 0, **config) -> AutoencoderKLODVAE:
    torch.manual_seed(seed)
    settings = {"block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 4} | config
    return AutoencoderKLODVAE(**settings).eval()


def random_video(frames: int, batch: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1
