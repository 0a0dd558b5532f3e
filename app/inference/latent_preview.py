"""Preview latents without the decoder: colors are nearly a linear function of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from odvae.data.transforms import to_uint8
from odvae.utils.seeding import generator

SIDE, FRAMES = 64, 5  # of the pictures that the matrix is fitted to


@torch.no_grad()
def fit_color_matrix(vae: Any) -> Tensor:
    """Return a matrix (c + 1, 3) from a normalized latent and 1 to the mean color, in [-1, 1], of its pixels: least
    squares over smooth random pictures."""
    factor = vae.spatial_compression_ratio
    side = max(1, SIDE // factor) * factor
    noise = torch.rand(24, 3, 4, 4, generator=generator(0, "preview"))
    pictures = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1) * 2 - 1
    video = pictures[:, :, None].expand(-1, -1, FRAMES, -1, -1).contiguous()
    latents = vae.normalize(vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mean.float()).cpu()
    colors = torch.nn.functional.avg_pool2d(pictures, factor)[:, :, None].expand(-1, -1, latents.shape[2], -1, -1)
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).movedim(1, -1).reshape(-1, latents.shape[1] + 1)
    return torch.linalg.lstsq(inputs, colors.movedim(1, -1).reshape(-1, 3)).solution


def preview_picture(latent: Tensor, matrix: Tensor) -> np.ndarray:
    """Return a normalized latent (c, h, w) as a picture, uint8 (h, w, 3)."""
    c = latent.shape[0]
    colors = torch.einsum("chw,cd->dhw", latent.float().cpu(), matrix[:c]) + matrix[c][:, None, None]
    return to_uint8(colors[:, None].clamp(-1, 1))[0]

