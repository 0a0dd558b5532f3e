"""Latents that keep their meaning: those of some clips stay what an earlier VAE made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from ..model import AutoencoderKLODVAE
from .terms import TermConfig


class AnchorConfig(TermConfig):
    vae: Path | None = None  # the earlier VAE, a video VAE
    folder: Path | None = None  # only clips below it are held; none: all


class Anchor(nn.Module):
    """Squared distance of a VAE's latents to those of an earlier one, in units of the latter's deviation.

    What was trained on latents of the earlier VAE, a diffusion transformer above all, then goes on with the new one,
    which is free on clips that the earlier one could not show.
    """

    def __init__(self, vae: AutoencoderKLODVAE, folder: Path | None) -> None:
        super().__init__()
        self.vae, self.folder = vae.requires_grad_(False).eval(), folder and folder.resolve()

    def forward(self, video: Tensor, paths: Sequence[Path], model: AutoencoderKLODVAE | AutoencoderKL,
                mean: Tensor) -> Tensor:
        """Mean over the latent values of the clips that are held; 0 without one.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], from the files `paths`.
            mean: what `model` encodes it to: (B, c, t, h, w), or (B T, c, h, w) where it is an image VAE.
        """
        held = [i for i, path in enumerate(paths) if self.folder is None or self.folder in path.resolve().parents]
        if not held:
            return mean.new_zeros(())
        if isinstance(model, AutoencoderKL):  # every frame is a clip of its own
            mean = rearrange(mean, "(b t) c h w -> b t c 1 h w", b=len(video))[held].flatten(0, 1)
            clips = rearrange(video[held], "b c t h w -> (b t) c 1 h w")
        else:
            mean, clips = mean[held], video[held]
        with torch.no_grad():
            earlier = self.vae.normalize(self.vae.encode(clips).latent_dist.mean.float())
        return (self.vae.normalize(mean.float()) - earlier).square().mean()
