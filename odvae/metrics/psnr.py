"""Peak signal-to-noise ratio, as papers on video VAEs report it."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR in dB of each frame: two videos (B, C, T, H, W) in [-1, 1] -> (B, T). Equal frames give infinity.

    Values are first clamped to [-1, 1] and mapped to [0, 1], so that the peak is 1.
    """
    a, b = ((v.float().clamp(-1, 1) + 1) / 2 for v in (a, b))
    return -10 * torch.log10((a - b).square().mean(dim=(1, 3, 4)))
