"""Structural similarity (Wang et al. 2004): Gaussian window of 11 taps, sigma 1.5, K1 = .01, K2 = .03."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

TAPS, SIGMA, K1, K2 = 11, 1.5, .01, .03


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each frame: two videos (B, C, T, H, W) in [-1, 1], sides of at least 11 -> (B, T), at most 1."""
    batch = a.shape[0]
    a, b = (rearrange((v.float().clamp(-1, 1) + 1) / 2, "b c t h w -> (b t) c h w") for v in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return rearrange(value.mean(dim=(1, 2, 3)), "(b t) -> b t", b=batch)


def _blur(x: Tensor) -> Tensor:
    """Valid Gaussian blur of each channel, one axis after the other."""
    taps = torch.exp(-(torch.arange(TAPS, device=x.device, dtype=x.dtype) - TAPS // 2) ** 2 / (2 * SIGMA**2))
    taps = taps / taps.sum()
    channels = x.shape[1]
    x = F.conv2d(x, taps.view(1, 1, TAPS, 1).expand(channels, 1, -1, -1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, TAPS).expand(channels, 1, -1, -1), groups=channels)
