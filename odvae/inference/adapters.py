"""One interface to any image or video autoencoder, ours or diffusers': video to latents to video."""

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

IMAGE_BATCH_SIZE = 8  # frames per call of an image model


class AutoencoderAdapter:
    """A model behind the interface that `evaluate` needs; all that it must know is read from the model.

    A video whose length or sides do not fit is padded by its last frame and its edges, and the result cropped, so that
    every model is measured on the same frames. Latents are the raw mean of the encoder, without scaling factor, as
    `decode` takes them.

    Attributes:
        is_image_model: whether the model has no 3D convs.
        temporal_compression: frames per latent frame; 1 for an image model.
        spatial_compression: pixels per latent and side.
        chunk: frames that the model decodes at a time, counted from the end if `from_end`, else from the start; the
            frames of one latent if the model does not decode in chunks; 0 for an image model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_image_model = not any(isinstance(module, nn.Conv3d) for module in model.encoder.modules())
        self.temporal_compression = 1 if self.is_image_model else int(
            _get_ratio(model, "temporal_compression_ratio", "scale_factor_temporal"))
        # Our image VAEs take pixels that are folded into channels (`patchify`), as AutoencoderKLODVAE does by itself.
        self.patch = math.isqrt(model.config.in_channels // 3) if self.is_image_model else 1
        self.spatial_compression = self.patch * int(
            _get_ratio(model, "spatial_compression_ratio", "scale_factor_spatial"))
        # Allegro works only in tiles, which start at multiples of a stride and are never cut short.
        self._tiles = (model.kernel, model.stride) if hasattr(model, "kernel") and hasattr(model, "stride") else None
        if self._tiles:
            model.enable_tiling()
            self.chunk, self.from_end = int(self._tiles[1][0]), False
        else:
            self.chunk, self.from_end = _decode_chunk(model, self.temporal_compression, self.is_image_model)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def padded_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the smallest (frames, height, width) that the model takes and that is not smaller than this."""
        if self._tiles:
            sides = [kernel + max(0, -(-(side - kernel) // stride)) * stride for side, kernel, stride in
                     zip((frames, height, width), *self._tiles, strict=True)]
            return sides[0], sides[1], sides[2]
        time, space = self.temporal_compression, self.spatial_compression
        return 1 + -(-(frames - 1) // time) * time, -(-height // space) * space, -(-width // space) * space

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Video (1, 3, T, H, W) in [-1, 1], any T, H, W -> the mean of its latents, in the model's own layout: (1, c,
        t, h, w), or (T, c, h, w) for an image model."""
        size = self.padded_size(*video.shape[2:])
        padding = [after - before for after, before in zip(size, video.shape[2:], strict=True)]
        video = F.pad(video, (0, padding[2], 0, padding[1], 0, padding[0]), mode="replicate")
        video = video.to(self.model.device, self.model.dtype)
        if not self.is_image_model:
            return _mean(self.model.encode(video))
        images = patchify(video, self.patch)[0].transpose(0, 1)
        return torch.cat([_mean(self.model.encode(x)) for x in images.split(IMAGE_BATCH_SIZE)])

    @torch.inference_mode()
    def decode(self, latents: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Latents of `encode` -> float32 (1, 3, frames, height, width), about [-1, 1], on the CPU.

        Raises:
            UserError: the model returns fewer frames or pixels than were encoded.
        """
        if not self.is_image_model:
            video = self.model.decode(latents).sample
            if self._tiles:  # Allegro: (1, T, 3, H, W)
                video = video.transpose(1, 2)
        elif "num_frames" in inspect.signature(self.model.decode).parameters:  # 2D in, but its decoder sees time
            images = self.model.decode(latents, num_frames=len(latents)).sample
            video = rearrange(images, "t c h w -> 1 c t h w")
        else:
            images = torch.cat([self.model.decode(z).sample for z in latents.split(IMAGE_BATCH_SIZE)])
            video = unpatchify(rearrange(images, "t c h w -> 1 c t h w"), self.patch)
        video = video[:, :, :frames, :height, :width].float().cpu()
        if video.shape[2:] != (frames, height, width):
            raise UserError(f"{type(self.model).__name__} decoded {tuple(video.shape[2:])} instead of "
                            f"{(frames, height, width)} (frames, height, width)")
        return video

    def chunk_starts(self, frames: int) -> list[int]:
        """Return the first frame of every chunk but the first, in a clip of `frames` frames."""
        if not self.chunk:
            return []
        if self.from_end:  # the first chunk takes the remainder
            end = self.chunk - 1 if self.chunk > self.temporal_compression else 0
            return sorted(range(frames - self.chunk, end, -self.chunk))
        return list(range(self.chunk, frames, self.chunk))


def load_autoencoder(source: str, dtype: torch.dtype = torch.float32) -> AutoencoderAdapter:
    """Load one of our VAEs or any autoencoder of diffusers from a folder or hub name, also from a pipeline's `vae`.

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
    """Return the class of the autoencoder at a folder or hub name, and the subfolder it is in (None: none).

    Reads the config only. Raises UserError as `load_autoencoder` does.
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
                            f"{diffusers.__version__}; a newer version may have it")
        return cls, folder
    where = "holds neither config.json nor vae/config.json" if Path(source).is_dir() else \
        "is not a folder, and the hub has no config.json of that name"
    raise UserError(f"{source} {where}; give an autoencoder's folder or hub name ({reason})")


def _get_ratio(model: Any, *names: str) -> Any:
    """Return the first of these attributes that the model or its config has; failing that, the compression of a plain
    stack of halvings."""
    for owner in (model, model.config):
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    if "spatial_compression_ratio" in names and getattr(model.config, "block_out_channels", None):
        return 2 ** (len(model.config.block_out_channels) - 1)
    raise UserError(f"a {type(model).__name__} has no {names[0]}")


def _decode_chunk(model: Any, time: int, is_image_model: bool) -> tuple[int, bool]:
    """Return `AutoencoderAdapter.chunk` and `from_end`."""
    if is_image_model:
        return 0, True
    framewise = getattr(model, "use_framewise_decoding", None)  # None: it always decodes in chunks
    if framewise is not False:
        if hasattr(model, "tile_sample_stride_num_frames"):
            return int(model.tile_sample_stride_num_frames), False
        if hasattr(model, "num_latent_frames_batch_size"):
            return int(model.num_latent_frames_batch_size) * time, True
    return time, True


def _mean(encoded: Any) -> Tensor:
    """Return the mean of what an autoencoder of diffusers returns: a distribution, or plain latents."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent
