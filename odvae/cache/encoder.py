"""A common interface to our autoencoder and those of diffusers, for builds: geometry, and latents (B, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..data.video.reader import VideoError
from ..inference.adapters import AutoencoderAdapter
from ..inference.fingerprint import DTYPES, Dtype
from ..inference.streaming import encode_groups, encode_stream
from ..model import AutoencoderKLODVAE
from ..model.compilation import check_compilable, compile_vae
from ..model.shapes import patchify
from ..utils.errors import UserError
from ..utils.precision import precision_of, resolve_precision, set_precision, upcast_unsupported
from ..utils.precision_names import Computed, Precision
from ..utils.storage import Storage
from . import format as fmt

TILE_FRAMES = 29  # of the paper's temporal tiling


def choose_precision(precision: Precision | None, storage: Storage, model: Any,
                     devices: Sequence[str] = ()) -> Computed | None:
    """Return the precision that a build encodes in: by "auto" that of the cache, where there is one, else what suits
    the first of `devices`, or the model's device. None if none is asked for: the model's own.

    A cache's latents have one precision, so that its clips are alike; a build in another is refused
    (`build.builder.check_folder`).
    """
    if precision is None:
        return None
    if precision == "auto" and storage.exists(fmt.HEADER):
        precision = fmt.read_header(storage).vae.precision
    kind = devices[0].partition("=")[0].replace("gpu", "cuda") if devices else model.device  # of Ray "gpu=4"
    return resolve_precision(precision, kind, type(model).__name__)


class LatentEncoder:
    """An autoencoder behind a common interface. Latents are raw: no scaling factor is applied.

    Args:
        model: an AutoencoderKLODVAE, an image VAE (which encodes frame by frame) or a video VAE of diffusers.
        stored: "mean", or "moments" for mean and log-variance on twice the channels.
        precision: of the computation; the model is cast when it first encodes or decodes, on the device that it is on
            then, so that its fingerprint is that of the weights as they were loaded. None: the model's own.
        compiled_batch: compile an OD-VAE's blocks for this many clips, and encode fewer one by one, so that few graphs
            are needed (`model.compilation`). None: do not compile.

    Raises:
        UserError: the model cannot be compiled.
    """

    def __init__(self, model: Any, stored: fmt.Stored = "mean", precision: Computed | None = None, *,
                 compiled_batch: int | None = None) -> None:
        if precision is None:
            upcast_unsupported([model])
        self.model, self.stored = model, stored
        self.precision = precision or precision_of(model)
        self._compiled_batch = compiled_batch
        self._ready = precision is None and compiled_batch is None
        self.is_odvae = isinstance(model, AutoencoderKLODVAE)
        if compiled_batch is not None:
            check_compilable(model)
        self.adapter = AutoencoderAdapter(model)
        c = getattr(model.config, "latent_channels", None) or getattr(model.config, "z_dim", None)
        if c is None:
            raise UserError(f"the config of {type(model).__name__} has neither latent_channels nor z_dim")
        self.channels = int(c)
        self.header = fmt.vae_header(model, latent_channels=self.channels, temporal=self.adapter.temporal_compression,
                                     spatial=self.adapter.spatial_compression, precision=self.precision)

    def check(self, frames: Iterable[int], sizes: Iterable[tuple[int, int]]) -> None:
        """Raise UserError for lengths and sizes that do not fit the model, naming the next that do."""
        for height, width in sizes:
            if self.is_odvae:
                self.model.check_size(height, width)
            for length in frames:
                if self.is_odvae:
                    self.model.latent_frames(length)
                fitted = self.adapter.padded_size(length, height, width)
                if fitted != (length, height, width):
                    raise UserError(f"{length} frames of {height}x{width} do not fit {type(self.model).__name__}; "
                                    f"the next that does is {fitted[0]} frames of {fitted[1]}x{fitted[2]}")

    def latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // self.adapter.temporal_compression

    def bytes_of(self, frames: int, height: int, width: int, dtype: Dtype) -> int:
        """Return the size of the stored latent of a clip."""
        channels = self.channels * (2 if self.stored == "moments" else 1)
        area = height * width // self.adapter.spatial_compression**2
        return channels * self.latent_frames(frames) * area * DTYPES[dtype].itemsize

    @torch.inference_mode()
    def encode(self, videos: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, c or 2c, t, h, w). Raises VideoError where a size does not fit."""
        size = tuple(videos.shape[2:])
        if self.adapter.padded_size(*size) != size:
            raise VideoError(f"{size[0]} frames of {size[1]}x{size[2]} do not fit {type(self.model).__name__}",
                             "exclude clips of this size", "size")
        self._prepare()
        if self._compiled_batch is not None and 1 < len(videos) != self._compiled_batch:
            return torch.cat([self.encode(video) for video in videos.split(1)])
        x = videos.to(self.model.device, self.model.dtype)
        if not self.adapter.is_image_model:
            return self._latent_of(self.model.encode(x))
        pictures = rearrange(patchify(x, self.adapter.patch), "b c t h w -> (b t) c h w")
        z = torch.cat([self._latent_of(self.model.encode(part)) for part in pictures.split(8)])
        return rearrange(z, "(b t) c h w -> b c t h w", b=len(videos))

    @torch.inference_mode()
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Tensor:
        """A long clip in chunks (1, 3, t, H, W) -> (1, c or 2c, t, h, w), in constant memory if the model streams. An
        OD-VAE that is not causal encodes it by the paper's temporal tiling."""
        self._prepare()
        x = (chunk.to(self.model.device, self.model.dtype) for chunk in chunks)
        moments = self.stored == "moments"
        if self.is_odvae and self.model.causal:
            return torch.cat([z.cpu() for z in encode_stream(self.model, x, moments=moments)], 2)
        if self.is_odvae:
            return encode_groups(self.model, torch.cat(list(x), 2), group=TILE_FRAMES, moments=moments).cpu()
        if self.adapter.is_image_model:
            return torch.cat([self.encode(chunk).cpu() for chunk in x], 2)
        return self.encode(torch.cat(list(x), 2)).cpu()

    @torch.inference_mode()
    def decode(self, mean: Tensor, frames: int, height: int, width: int) -> Tensor:
        """The mean of one latent (c, t, h, w) -> (1, 3, frames, height, width), about [-1, 1], on the CPU."""
        self._prepare()
        z = mean[None].to(self.model.device, self.model.dtype)
        if self.adapter.is_image_model:
            z = rearrange(z, "1 c t h w -> t c h w")
        return self.adapter.decode(z, frames, height, width)

    def mean(self, stored: Tensor) -> Tensor:
        """Return the mean of a latent as stored (c or 2c, t, h, w)."""
        return stored[: self.channels]

    def _prepare(self) -> None:
        if self._ready:
            return
        set_precision(self.model, self.precision)
        if self.is_odvae and self.model.device.type == "cuda":
            self.model.fuse()  # stores kernels channels last
        if self._compiled_batch is not None:
            compile_vae(self.model)
        self._ready = True

    def _latent_of(self, encoded: Any) -> Tensor:
        distribution = getattr(encoded, "latent_dist", None)
        if distribution is not None:
            latent: Tensor = distribution.mode() if self.stored == "mean" else torch.cat(
                [distribution.mean, distribution.logvar], 1)
            return latent
        if self.stored == "moments":
            raise UserError(f"a {type(self.model).__name__} has no posterior; store its latents with --store mean")
        latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return latent
