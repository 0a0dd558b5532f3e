"""Any autoencoder for pictures or videos, ours or diffusers', behind one interface: video in, latents, video out."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..model import AutoencoderKLODVAE
from ..model.shapes import patchify, unpatchify
from ..utils.errors import UserError

IMAGES_AT_ONCE = 8  # frames through an image model


class AutoencoderAdapter:
    """What `evaluate` needs of a model. Everything that it must know it asks of the model.

    A video that does not fit (the length, the sides) is padded by its last frame and its edges, and the result cropped,
    so that every model is measured on the same frames. Latents are the encoder's mean, raw: no scaling factor is
    applied, as none is wanted by `decode`.

    Attributes:
        temporal_compression: frames that one latent stands for; 1 for an image model.
        spatial_compression: pixels a side that one latent stands for.
        chunk: frames that the model decodes at a time, counted from the end where `from_end`, else from the beginning;
            for a model that does not work in chunks, the frames of one latent. 0 for an image model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.images = not any(isinstance(module, nn.Conv3d) for module in model.encoder.modules())
        self.temporal_compression = 1 if self.images else int(
            _asked(model, "temporal_compression_ratio", "scale_factor_temporal"))
        # Our image VAEs take pixels that are folded into channels (`patchify`), as AutoencoderKLODVAE does by itself.
        self.patch = math.isqrt(model.config.in_channels // 3) if self.images else 1
        self.spatial_compression = self.patch * int(
            _asked(model, "spatial_compression_ratio", "scale_factor_spatial"))
        # Allegro has no other way than its tiles, which begin at multiples of a stride and are never cut short.
        self._tiles = (model.kernel, model.stride) if hasattr(model, "kernel") and hasattr(model, "stride") else None
        if self._tiles:
            model.enable_tiling()
        chunk = (self._tiles[1][0], False) if self._tiles else _chunk(model, self.temporal_compression, self.images)
        self.chunk: int = chunk[0]
        self.from_end: bool = chunk[1]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def fitted(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The nearest length and sides from (frames, height, width) upwards that the model takes."""
        if self._tiles:
            sides = [kernel + max(0, -(-(side - kernel) // stride)) * stride for side, kernel, stride in
                     zip((frames, height, width), *self._tiles, strict=True)]
            return sides[0], sides[1], sides[2]
        time, space = self.temporal_compression, self.spatial_compression
        return 1 + -(-(frames - 1) // time) * time, -(-height // space) * space, -(-width // space) * space

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Video (1, 3, T, H, W) in [-1, 1], any T, H, W -> the mean of its latents, in the model's own layout: (1, c,
        t, h, w), or (T, c, h, w) of an image model."""
        size = self.fitted(*video.shape[2:])
        more = [after - before for after, before in zip(size, video.shape[2:], strict=True)]
        video = F.pad(video, (0, more[2], 0, more[1], 0, more[0]), mode="replicate")
        video = video.to(self.model.device, self.model.dtype)
        if not self.images:
            return _mean(self.model.encode(video))
        pictures = patchify(video, self.patch)[0].transpose(0, 1)
        return torch.cat([_mean(self.model.encode(x)) for x in pictures.split(IMAGES_AT_ONCE)])

    @torch.inference_mode()
    def decode(self, latents: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Latents of `encode` -> float32 (1, 3, frames, height, width), about [-1, 1], on the CPU.

        Raises:
            UserError: the model gives fewer frames or pixels than went in.
        """
        if not self.images:
            video = self.model.decode(latents).sample
            if self._tiles:  # Allegro: (1, T, 3, H, W)
                video = video.transpose(1, 2)
        elif "num_frames" in inspect.signature(self.model.decode).parameters:  # 2D in, but its decoder sees time
            found = self.model.decode(latents, num_frames=len(latents)).sample
            video = rearrange(found, "t c h w -> 1 c t h w")
        else:
            found = torch.cat([self.model.decode(z).sample for z in latents.split(IMAGES_AT_ONCE)])
            video = unpatchify(rearrange(found, "t c h w -> 1 c t h w"), self.patch)
        video = video[:, :, :frames, :height, :width].float().cpu()
        if video.shape[2:] != (frames, height, width):
            raise UserError(f"{type(self.model).__name__} gave back {tuple(video.shape[2:])} of "
                            f"{(frames, height, width)} (frames, height, width)")
        return video

    def joins(self, frames: int) -> list[int]:
        """The frames, of a clip of so many, that begin a chunk; not the first chunk's."""
        if not self.chunk:
            return []
        if self.from_end:  # a remainder goes to the first chunk
            end = self.chunk - 1 if self.chunk > self.temporal_compression else 0
            return sorted(range(frames - self.chunk, end, -self.chunk))
        return list(range(self.chunk, frames, self.chunk))


def load_autoencoder(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderAdapter:
    """Load a folder, or a hub name, with one of our VAEs or any autoencoder of diffusers; a pipeline's `vae` counts.

    Raises:
        UserError: there is none, or diffusers does not know its class.
    """
    cls, folder = find_autoencoder(source)
    try:
        model = cls.from_pretrained(source, subfolder=folder, torch_dtype=dtype, use_safetensors=True)
        return AutoencoderAdapter(model.eval().requires_grad_(False))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the {cls.__name__} in {source}: {error}") from error


def find_autoencoder(source: str) -> tuple[Any, str | None]:
    """The class of the autoencoder at a folder or hub name, and the subfolder that it is in (None: none).

    Reads a config and no weights. Raises UserError as `load_autoencoder`.
    """
    reason: Exception | None = None
    for folder in (None, "vae"):
        try:
            name = AutoencoderKLODVAE.load_config(source, subfolder=folder).get("_class_name")
        except (OSError, ValueError) as error:
            reason = reason or error
            continue
        cls = AutoencoderKLODVAE if name == "AutoencoderKLODVAE" else getattr(diffusers, str(name), None)
        if cls is None or not all(hasattr(cls, part) for part in ("encode", "decode", "from_pretrained")):
            raise UserError(f"{source} describes a {name}, which is neither ours nor an autoencoder of diffusers "
                            f"{diffusers.__version__}; a newer version may know it")
        return cls, folder
    where = "holds no config.json, and no vae/config.json" if Path(source).is_dir() else \
        "is no folder, and no name that the hub gave a config.json for"
    raise UserError(f"{source} {where}; give an autoencoder's folder or hub name ({reason})")


def _asked(model: Any, *names: str) -> Any:
    """The first of these that the model or its config knows; last, what a plain stack of halvings comes to."""
    for place in (model, model.config):
        for name in names:
            value = getattr(place, name, None)
            if value is not None:
                return value
    if "spatial_compression_ratio" in names and getattr(model.config, "block_out_channels", None):
        return 2 ** (len(model.config.block_out_channels) - 1)
    raise UserError(f"a {type(model).__name__} does not tell its {names[0]}")


def _chunk(model: Any, time: int, images: bool) -> tuple[int, bool]:
    """`AutoencoderAdapter.chunk` and `from_end`."""
    if images:
        return 0, True
    framewise = getattr(model, "use_framewise_decoding", None)  # None: it has no other way
    if framewise is not False:
        if hasattr(model, "tile_sample_stride_num_frames"):
            return int(model.tile_sample_stride_num_frames), False
        if hasattr(model, "num_latent_frames_batch_size"):
            return int(model.num_latent_frames_batch_size) * time, True
    return time, True


def _mean(encoded: Any) -> Tensor:
    """Of what diffusers' autoencoders call their result: a distribution, or latents as they are."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent
