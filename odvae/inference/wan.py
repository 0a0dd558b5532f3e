"""The VAE of Wan 2.1 (diffusers' AutoencoderKLWan) with the interface of an OD-VAE, so that an LVDM can be trained on
its latents and decode them group by group.

It is causal too: a later chunk needs only the last inputs of each causal conv from the earlier ones. diffusers keeps
them in the model while it goes through a video; here they are the state that a chunk takes and returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401  (a pipeline's loader looks here for the class with its methods)
from torch import Tensor

from ..model import AutoencoderKLODVAE
from ..model.conv import StreamState
from ..model.shapes import ShapeMixin
from ..model.tiling import Tiling
from ..utils.errors import UserError
from .loading import load_vae


class AutoencoderKLWan(ShapeMixin, diffusers.AutoencoderKLWan):
    """Weights, config, `encode` and `decode` are diffusers'; tiles are not supported."""

    causal, compiled = True, False
    tiling = Tiling(256, 256, 64)  # of no effect: `use_tiling` stays False
    spatial_compression_ratio, z_dim = 8, 16  # diffusers sets both on the instance

    @property
    def temporal_compression_ratio(self) -> int:
        return int(self.config.scale_factor_temporal)

    @property
    def latent_channels(self) -> int:
        return int(self.config.z_dim)

    def chunk_frames(self, height: int, width: int) -> int:
        """The frames of one latent, of any size: it computes one latent at a time whatever the chunk."""
        return self.temporal_compression_ratio

    def fuse(self) -> None:
        """Do nothing; see `AutoencoderKLODVAE.fuse`."""

    def unfuse(self) -> None:
        """Do nothing."""

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError: a stream has one state, not one per tile."""
        raise UserError("Wan's VAE cannot stream in tiles here; free some memory, or use a smaller size or batch")

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(list(values)).view(1, -1, 1, 1, 1)
                     for values in (self.config.latents_mean, self.config.latents_std))
        return mean, std

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents (B, c, t, h, w) to zero mean and unit deviation per channel."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalize(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics(normalised)
        return normalised * std + mean

    def encode_chunk(self, x: Tensor, state: StreamState = ()) -> tuple[Tensor, StreamState]:
        """Video chunk (B, 3, t, H, W) -> moments (B, 2c, t', H/8, W/8) and the state for the next chunk. The first
        chunk has 1 + 4k frames, a later one 4k."""
        ratio, first = self.temporal_compression_ratio, () if state else (x[:, :, :1],)
        cache = list(state) if state else [None] * self._cached_conv_counts["encoder"]
        rest = x[:, :, len(first):]
        parts = [*first, *(rest.split(ratio, 2) if rest.shape[2] else ())]
        moments = torch.cat([self.encoder(part, feat_cache=cache, feat_idx=[0]) for part in parts], 2)
        return self.quant_conv(moments), tuple(cache)

    def decode_chunk(self, z: Tensor, state: StreamState = ()) -> tuple[Tensor, StreamState]:
        """Latent chunk (B, c, t, h, w) -> video chunk (B, 3, t', 8h, 8w) in [-1, 1] and the state for the next
        chunk."""
        cache = list(state) if state else [None] * self._cached_conv_counts["decoder"]
        video = torch.cat([self.decoder(part, feat_cache=cache, feat_idx=[0], first_chunk=not state and i == 0)
                           for i, part in enumerate(self.post_quant_conv(z).split(1, 2))], 2)
        return video.clamp(-1, 1), tuple(cache)


def load_causal_vae(folder: Path | str) -> Any:
    """Load a VAE that streams, ours or Wan's, in float32. Raises UserError for an image VAE, and as `load_vae`."""
    path = Path(folder)
    if (path / "config.json").is_file() and \
            AutoencoderKLODVAE.load_config(path).get("_class_name") == "AutoencoderKLWan":
        try:
            vae: Any = AutoencoderKLWan.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the VAE in {path}: {error}") from error
        if vae.config.patch_size is not None:
            raise UserError(f"{path} holds a VAE of Wan 2.2, which folds pixels; only that of Wan 2.1 is supported")
        return vae
    vae = load_vae(path)
    if not isinstance(vae, AutoencoderKLODVAE):
        raise UserError(f"{folder} holds an image VAE; an LVDM trains on the latents of an OD-VAE. `odvae inflate "
                        f"{folder} OUT --variant 0` makes one of it that encodes frame by frame")
    return vae
