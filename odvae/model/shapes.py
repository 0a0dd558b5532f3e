"""The shapes a video VAE takes and gives: compression ratios, lengths, sizes, and checks of inputs."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..geometry import compression
from ..utils.errors import UserError
from .tiling import Tiling

CHUNK_PIXELS = 4 * 256 * 256  # a chunk of a stream: smaller ones leave cores idle, larger ones only take memory


class ShapeMixin:
    """Compression ratios, lengths and checks of inputs, for a model with a diffusers config."""

    config: Any
    use_tiling: bool
    tiling: Tiling

    @property
    def temporal_compression_ratio(self) -> int:
        return compression(self.config)[0]

    @property
    def spatial_compression_ratio(self) -> int:
        return compression(self.config)[1]

    @property
    def latent_channels(self) -> int:
        return int(self.config.latent_channels)

    # The names that diffusers' video pipelines use.

    @property
    def z_dim(self) -> int:
        return self.latent_channels

    @property
    def scale_factor_temporal(self) -> int:
        return self.temporal_compression_ratio

    @property
    def scale_factor_spatial(self) -> int:
        return self.spatial_compression_ratio

    def chunk_frames(self, height: int, width: int) -> int:
        """Video frames per chunk when a video of this size is streamed: as many whole latents as fit `CHUNK_PIXELS`,
        at least one."""
        if self.use_tiling:
            height, width = min(height, self.tiling.height), min(width, self.tiling.width)
        ratio = self.temporal_compression_ratio
        return ratio * max(1, CHUNK_PIXELS // (height * width * ratio))

    def chunk_latents(self, height: int, width: int) -> int:
        """Return `chunk_frames` in latent frames, for latents of this size."""
        ratio = self.spatial_compression_ratio
        return self.chunk_frames(ratio * height, ratio * width) // self.temporal_compression_ratio

    def check_chunk_frames(self, frames: int) -> None:
        """Raise UserError unless a chunk of `frames` video frames is whole latents; it names the nearest that is."""
        ratio = self.temporal_compression_ratio
        if frames < ratio or frames % ratio:
            raise UserError(f"a chunk of {frames} frames does not fit the VAE, which takes multiples of {ratio}; the "
                            f"nearest is {max(ratio, ratio * round(frames / ratio))}")

    def latent_frames(self, frames: int) -> int:
        """Return 1 + (frames - 1) / 4; raise UserError unless `frames` is 1 + 4k."""
        ratio = self.temporal_compression_ratio
        if frames < 1 or (frames - 1) % ratio:
            below = max(1, frames - (frames - 1) % ratio)
            raise UserError(f"{frames} frames do not fit the VAE, which takes 1 + {ratio}k frames; "
                            f"the nearest are {below} and {below + ratio}")
        return 1 + (frames - 1) // ratio

    def check_video(self, x: Tensor) -> None:
        """Raise UserError unless x is (B, C, 1+4k, 8m, 8n)."""
        self.check_pixels(x)
        self.latent_frames(x.shape[2])

    def check_pixels(self, x: Tensor) -> None:
        """Raise UserError unless x is a video, or a chunk of one, (B, C, T, 8m, 8n), of at least one sample."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels or not len(x):
            raise UserError(f"expected a video (B, {self.config.in_channels}, T, H, W) with at least one sample, got "
                            f"shape {tuple(x.shape)}")
        self.check_size(*x.shape[3:])

    def check_latents(self, z: Tensor) -> None:
        """Raise UserError unless z is (B, c, T, h, w), with at least one of each."""
        if z.ndim != 5 or z.shape[1] != self.latent_channels or not z.numel():
            raise UserError(f"expected latents (B, {self.latent_channels}, T, h, w), at least one of each, got shape "
                            f"{tuple(z.shape)}")

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless both sides are multiples of 8, naming the nearest."""
        ratio = self.spatial_compression_ratio
        if height % ratio or width % ratio or not height or not width:
            near = [max(ratio, ratio * round(side / ratio)) for side in (height, width)]
            raise UserError(f"{height}x{width} pixels do not fit the VAE, whose sides are multiples of {ratio}; "
                            f"the nearest is {near[0]}x{near[1]}")


def patchify(x: Tensor, p: int) -> Tensor:
    """Fold p x p pixels into channels: (B, C, T, H, W) -> (B, C p p, T, H/p, W/p)."""
    return rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=p, q=p) if p > 1 else x


def unpatchify(x: Tensor, p: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c p q) t h w -> b c t (h p) (w q)", p=p, q=p) if p > 1 else x
