"""The terms of `odvae.losses.latents` in a training, of a video VAE or an image VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from einops import rearrange
from torch import Generator, Tensor

from ..losses.latents import latent_losses
from ..losses.reconstruction import LossConfig, pixel_error


def weighted_latent_losses(loss: Tensor, config: LossConfig, weights: Mapping[str, float], video: Tensor, mean: Tensor,
                           sample: Tensor, encode: Callable[[Tensor], Any], decode: Callable[[Tensor, int], Tensor],
                           draw: Callable[[str], Generator]) -> dict[str, Tensor]:
    """Return the terms that have a weight, and as "loss" the sum of `loss` and of all of them; nothing if none has.

    Args:
        weights: of this step, by term.
        video: (B, 3, T, H, W).
        mean, sample: of the posterior, (B, c, t, h, w), or (B*T, c, h, w) of an image VAE.
        encode, decode: from a video to a posterior, and from latents and B to a video.
        draw: see `latent_losses`.
    """
    used = {term: getattr(config, term) for term, weight in weights.items() if weight}
    if not used:
        return {}
    batch, images = len(video), sample.ndim == 4

    def as_clips(latents: Tensor) -> Tensor:
        return rearrange(latents, "(b t) c h w -> b c t h w", b=batch) if images else latents

    def decode_clips(latents: Tensor) -> Tensor:
        return decode(rearrange(latents, "b c t h w -> (b t) c h w") if images else latents, batch)

    losses = latent_losses(used, video, as_clips(mean), as_clips(sample), encode=lambda x: as_clips(encode(x).mean),
                           decode=decode_clips, error=lambda x, y: pixel_error(x, y, config), draw=draw)
    for term, value in losses.items():
        loss = loss + weights[term] * value
    return losses | {"loss": loss}
