"""From the latents that a pipeline of diffusers samples to frames, by its own VAE and scaling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from odvae.model.distilled_decoder import DistilledDecoder
from odvae.utils.errors import UserError
from odvae.utils.finite import is_finite, non_finite

from .offload import onload


@dataclass(frozen=True)
class Tile:
    """Sides and overlap of the tiles that a VAE decodes in, in pixels."""

    height: int
    width: int
    overlap: int


def decoder_tile(compression: int, height: int, width: int) -> Tile:
    """Return tiles of these sides, which overlap by a quarter. Raises UserError unless the VAE can decode in them."""
    if min(height, width) < 2 * compression or height % compression or width % compression:
        near = [max(2, round(side / compression)) * compression for side in (height, width)]
        raise UserError(f"tiles of {height}x{width} pixels: sides must be multiples of {compression} from "
                        f"{2 * compression} on; the nearest is {near[0]}x{near[1]}")
    return Tile(height, width, max(1, min(height, width) // 4 // compression) * compression)


def latents_of(pipeline: Any, sampled: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Return what a pipeline samples as (B, c, `frames`, h, w) float32, for a video of height x width pixels."""
    kind = type(pipeline).__name__
    if kind == "LTXPipeline":
        ratio = pipeline.vae_spatial_compression_ratio
        sampled = pipeline._unpack_latents(sampled, frames, height // ratio, width // ratio,
                                           pipeline.transformer_spatial_patch_size,
                                           pipeline.transformer_temporal_patch_size)
    if kind == "CogVideoXPipeline":
        sampled = sampled.movedim(1, 2)[:, :, -frames:]  # version 1.5 pads at the start
    return sampled.float()


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor, tile: Tile | None = None,
           distilled: DistilledDecoder | None = None) -> np.ndarray:
    """Decode latents (B, c, t, h, w) of `latents_of` to frames uint8 (B, T, H, W, 3), as the pipeline's own call does.

    Args:
        distilled: decodes in place of the VAE's decoder, without tiles.

    Raises:
        NonFiniteError: the decoder gave NaN or infinity.
    """
    vae = pipeline.vae
    onload(vae)
    device = pipeline._execution_device if hasattr(vae, "_hf_hook") else vae.device
    with _tiled(vae, tile) if distilled is None else _decoded_by(vae, distilled):
        video = _DECODERS[type(pipeline).__name__](pipeline, latents.to(device))
    if not is_finite(video):
        raise non_finite("the VAE's decoder", vae, f"for latents of up to {float(latents.abs().max()):.3g}")
    frames = pipeline.video_processor.postprocess_video(video, output_type="np")
    return np.rint(frames * 255).astype(np.uint8)


@contextmanager
def _tiled(vae: Any, tile: Tile | None) -> Iterator[None]:
    """Let the VAE decode in these tiles; None: as it is set. Allegro's decodes in tiles of its own size only."""
    takes = inspect.signature(vae.enable_tiling).parameters
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    if tile is not None:
        values = {"tile_sample_min_height": tile.height, "tile_sample_min_width": tile.width,
                  "tile_sample_stride_height": tile.height - tile.overlap,
                  "tile_sample_stride_width": tile.width - tile.overlap,
                  "tile_overlap_factor_height": tile.overlap / tile.height,
                  "tile_overlap_factor_width": tile.overlap / tile.width}
        vae.enable_tiling(**{name: value for name, value in values.items() if name in takes})
    elif type(vae).__name__ == "AutoencoderKLAllegro":
        vae.enable_tiling()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def _decoded_by(vae: Any, distilled: DistilledDecoder) -> Iterator[None]:
    """Let `vae.decode` be the distilled decoder's, which takes no timestep."""
    def decode(z: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        return nn.Module.to(distilled, z.device, z.dtype).decode(z, return_dict)

    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode  # the class's own again


def _statistic(vae: Any, name: str, like: Tensor) -> Tensor:
    return torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1).to(like.device, like.dtype)


def _decode_wan(pipeline: Any, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    z = latents.to(vae.dtype)
    inverse = 1.0 / _statistic(vae, "latents_std", z)
    video: Tensor = vae.decode(z / inverse + _statistic(vae, "latents_mean", z), return_dict=False)[0]
    return video


def _decode_ltx(pipeline: Any, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    z = pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    z = z.to(vae.dtype)
    timestep = z.new_zeros(len(z)) if vae.config.timestep_conditioning else None  # the call's default: no noise
    video: Tensor = vae.decode(z, timestep, return_dict=False)[0]
    return video


def _decode_cogvideox(pipeline: Any, latents: Tensor) -> Tensor:
    video: Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype).movedim(2, 1))
    return video


def _decode_hunyuan(pipeline: Any, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    video: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return video


def _decode_mochi(pipeline: Any, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    z = latents.to(vae.dtype)
    if vae.config.get("latents_mean") and vae.config.get("latents_std"):
        z = z * _statistic(vae, "latents_std", z) / vae.config.scaling_factor + _statistic(vae, "latents_mean", z)
    else:
        z = z / vae.config.scaling_factor
    video: Tensor = vae.decode(z, return_dict=False)[0]
    return video


def _decode_allegro(pipeline: Any, latents: Tensor) -> Tensor:
    video: Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype))
    return video


_DECODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "WanPipeline": _decode_wan, "LTXPipeline": _decode_ltx, "CogVideoXPipeline": _decode_cogvideox,
    "HunyuanVideoPipeline": _decode_hunyuan, "MochiPipeline": _decode_mochi, "AllegroPipeline": _decode_allegro}
