"""AutoencoderKLODVAE: the video VAE as a diffusers model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from ..utils.errors import UserError
from .compilation import CompiledBlocksMixin, even_parts
from .conv import CausalConv3d, StreamState, consume_state, tuned_convs
from .decoder import Decoder
from .encoder import Encoder
from .norm import NormKind
from .outputs import DecoderOutput, DiagonalGaussianDistribution
from .resample import Upsample, UpsampleMode
from .shapes import ShapeMixin, patchify, unpatchify
from .tiling import Tiling, tiled
from .variants import make_variant


class AutoencoderKLODVAE(CompiledBlocksMixin, ShapeMixin, ModelMixin, ConfigMixin):
    """Causal 3D video VAE of OD-VAE (arXiv 2409.01199): compresses 4x in time and 8x8 in space; the first frame only in
    space.

    An image is a video of one frame. By default GroupNorm works frame by frame and upsampling is by nearest neighbour,
    so the model is causal throughout: `odvae.inference.streaming` computes the same values chunk by chunk.

    Args:
        in_channels, out_channels: channels of the video.
        patch_size: side of the pixel patches that are folded into channels before the first conv (and unfolded after
            the last), in place of an outermost level. The paper has 1; 2 makes a small VAE several times faster.
        latent_channels: channels of the latent.
        block_out_channels: width of each level, pixels first; every level but the last halves height and width.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        norm_num_groups: groups of every GroupNorm; divides every width.
        variant: which convs are 2D: a row of `odvae.model.variants.VARIANTS`, or a custom one (`make_variant`).
        time_compression: 1, 2, 4 ...: the innermost log2(time_compression) halvings include time.
        norm: "frame": statistics of each frame, causal. "clip": over time, height and width in 3D blocks (as the public
            code does), neither causal nor streamable.
        upsample: how time is doubled: "nearest", causal, or "trilinear" (as the public code does), which looks one
            latent ahead and cannot be streamed.
        time_sampling: "joint": one strided conv halves time together with space, and one conv follows the upsampling of
            both (v1.2, the paper). "residual": separate modules mix a mean with a conv (v1.1 of the public code).
        latents_mean, latents_std: statistics of the encoder's means, per channel, measured after training; used by
            `normalize` and `denormalize`. None stands for 0 and 1.
        scaling_factor: `normalize` multiplies by it, after the statistics where there are any.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "SpatialAttention"]  # noqa: RUF012  (diffusers' contract)
    _repeated_blocks = ["ResnetBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        variant: int | Mapping[str, Sequence[str]] = 4,
        time_compression: int = 4,
        norm: NormKind = "frame",
        upsample: UpsampleMode = "nearest",
        time_sampling: Literal["joint", "residual"] = "joint",
        patch_size: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value, known in (("norm", norm, ("frame", "clip")), ("upsample", upsample, ("nearest", "trilinear")),
                                   ("time_sampling", time_sampling, ("joint", "residual"))):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; choose one of {known}")
        halvings = math.log2(time_compression)
        if halvings != int(halvings) or halvings > len(block_out_channels) - 1:
            raise UserError(f"time_compression {time_compression} must be a power of two of at most "
                            f"{2 ** (len(block_out_channels) - 1)} with {len(block_out_channels)} levels")
        kinds, joint = make_variant(variant, len(block_out_channels)), time_sampling == "joint"
        pixels = patch_size**2
        self.encoder = Encoder(
            in_channels * pixels, 2 * latent_channels, block_out_channels, layers=layers_per_block,
            groups=norm_num_groups, time_halvings=int(halvings), kinds=kinds.encoder, norm=norm, joint=joint)
        self.decoder = Decoder(
            latent_channels, out_channels * pixels, block_out_channels, layers=layers_per_block + 1,
            groups=norm_num_groups, time_halvings=int(halvings), kinds=kinds.decoder, norm=norm, upsample=upsample,
            joint=joint)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, 1, time_kernel=1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, 1, time_kernel=1)
        self.use_tiling, self.use_slicing, self.tiling = False, False, Tiling(512, 512, 128)  # diffusers' names

    @property
    def causal(self) -> bool:
        """Whether no frame depends on a later one, so that the model can be streamed exactly."""
        return bool(self.config.norm == "frame" and self.config.upsample == "nearest")

    def fuse(self) -> None:
        """Fuse each upsampling with the conv after it for inference, exactly (`model.resample.Upsample.fuse`), and
        store kernels channels last. The weights keep their values and can still be trained, loaded and saved. Undone by
        `unfuse`."""
        self._fuse(Upsample.fuse, torch.channels_last_3d)

    def unfuse(self) -> None:
        """Undo `fuse`."""
        self._fuse(Upsample.unfuse, torch.contiguous_format)

    def _fuse(self, change: Callable[[Upsample], None], layout: torch.memory_format) -> None:
        for module in self.modules():
            if isinstance(module, Upsample):
                change(module)
            elif isinstance(module, CausalConv3d):
                with torch.inference_mode(module.weight.is_inference()):  # an inference tensor could not be trained
                    module.weight.data = module.weight.data.contiguous(memory_format=layout)

    def enable_tiling(self, tile_sample_min_height: int | None = None, tile_sample_min_width: int | None = None,
                      tile_sample_stride_height: int | None = None, tile_sample_stride_width: int | None = None, *,
                      overlap: int | None = None) -> None:
        """Encode and decode in spatial tiles of this size in pixels and blend them where they overlap, so that memory
        depends on the tile. Not exact: norm and attention see one tile. Streaming still works.

        Args:
            tile_sample_stride_height, tile_sample_stride_width: pixels from one tile to the next; what is left of a
                tile is the overlap, on both axes the larger one.
            overlap: in place of the strides. None: a fourth of the shorter side.

        Raises:
            UserError: the tiles do not fit the VAE; names the nearest that do.
        """
        sides = [side for side in (tile_sample_min_height, tile_sample_min_width) if side is not None]
        height, width = (sides[0], sides[-1]) if sides else (self.tiling.height, self.tiling.height)
        unit = self.spatial_compression_ratio
        overlaps = [side - stride for side, stride in ((height, tile_sample_stride_height),
                                                       (width, tile_sample_stride_width)) if stride is not None]
        if overlaps and overlap is not None:
            raise UserError("give the overlap of tiles, or their strides, not both")
        if overlap is None:
            overlap = max(overlaps, default=min(height, width) // 4 // unit * unit)
        tiling = Tiling(height, width, overlap)
        tiling.check(unit)
        self.tiling, self.use_tiling = tiling, True

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode the samples of a batch one at a time, in less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Undo `enable_slicing`."""
        self.use_slicing = False

    def enable_group_offload(self, onload_device: torch.device | str, offload_device: torch.device | str = "cpu",
                             offload_type: str = "leaf_level", **kwargs: Any) -> None:
        """Offload layer by layer, with diffusers' arguments.

        Raises:
            UserError: `offload_type="block_level"`: layers are called without their block's `forward`.
        """
        if offload_type != "leaf_level":
            raise UserError("AutoencoderKLODVAE is offloaded by offload_type=\"leaf_level\" only; leave it out of "
                            "another type by exclude_modules=[\"vae\"]")
        self.unfuse()  # fused layers step aside anyhow, and files hold no channels-last weights
        super().enable_group_offload(torch.device(onload_device), torch.device(offload_device), offload_type, **kwargs)

    # Raw latents come from the encoder; normalised latents go to the diffusion transformer.

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        zeros, ones = [0.0] * self.latent_channels, [1.0] * self.latent_channels
        mean, std = (like.new_tensor(list(v)).view(1, -1, 1, 1, 1)
                     for v in (self.config.latents_mean or zeros, self.config.latents_std or ones))
        return mean, std if self.config.scaling_factor == 1 else std / self.config.scaling_factor

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw latents (B, c, t, h, w) to zero mean and unit deviation per channel, or by `scaling_factor`."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalize(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics(normalised)
        return normalised * std + mean

    # Encoder and decoder; the streaming state is an argument and a return value.

    def encode_chunk(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        """Video chunk (B, C, t, H, W) -> moments (B, 2c, t', H/8, W/8) and the state for the next chunk."""
        self._check_stream(state)
        if self.use_tiling:
            return tiled(self._encode_tile, x, state, self.tiling, 1, 1 / self.spatial_compression_ratio)
        return self._encode_tile(x, state)

    def _encode_tile(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        with tuned_convs(x, state):
            x, state = self.encoder(_channels_last(patchify(x, self.config.patch_size)), state)
            return self.quant_conv(x)[0], state

    def decode_chunk(self, z: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        """Latent chunk (B, c, t, h, w) -> video chunk (B, C, t', 8h, 8w) and the state for the next chunk."""
        self._check_stream(state)
        if self.use_tiling:
            ratio = self.spatial_compression_ratio
            return tiled(self._decode_tile, z, state, self.tiling, ratio, ratio)
        return self._decode_tile(z, state)

    def _decode_tile(self, z: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        with tuned_convs(z, state):
            x, state = self.decoder(self.post_quant_conv(_channels_last(z))[0], state)
            return unpatchify(x, self.config.patch_size), state

    def _in_chunks(self, step: Callable[[Tensor, StreamState], tuple[Tensor, StreamState]], x: Tensor, first: int,
                   frames: int) -> Tensor:
        """Apply `step` to a whole clip (B, C, T, H, W). If the model is causal, no gradient is needed and the clip is
        longer than `first` + `frames`, stream it: the same values in less memory. With slicing enabled, one sample at a
        time."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_chunks(step, sample, first, frames) for sample in x.split(1)])
        if torch.is_grad_enabled() or not self.causal or x.shape[2] <= first + frames:
            return step(x, None)[0]
        out: list[Tensor] = []
        state: StreamState = ()
        single = self.temporal_compression_ratio if first else 1
        for chunk in ([x[:, :, :first]] if first else []) + list(x[:, :, first:].split(frames, dim=2)):
            for part in even_parts(self, chunk, frames, single):
                state = consume_state(state)
                output, state = step(part, state)
                out.append(output)
        return torch.cat(out, dim=2)

    def _moments(self, x: Tensor) -> Tensor:
        self.check_video(x)
        return self._in_chunks(self.encode_chunk, x, 1, self.chunk_frames(*x.shape[3:]))

    def _check_stream(self, state: StreamState) -> None:
        if state is not None and not self.causal:
            raise UserError(f"a VAE with norm={self.config.norm!r} and upsample={self.config.upsample!r} cannot be "
                            "streamed, because its frames depend on later ones; use encode_groups and decode_groups of "
                            "odvae.inference.streaming")

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Video (B, 3, 1+4k, H, W) in [-1, 1] -> posterior over latents (B, c, 1+k, H/8, W/8)."""
        posterior = DiagonalGaussianDistribution(self._moments(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True,
               generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (B, c, 1+k, h, w) -> video (B, 3, 1+4k, 8h, 8w), about [-1, 1]. Nothing is drawn: `generator` is
        there as in diffusers' other VAEs."""
        self.check_latents(z)
        video = self._in_chunks(self.decode_chunk, z, 0, self.chunk_latents(*z.shape[3:]))
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True,
                generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        """Encode, take the mean of the posterior (or a sample), decode."""
        posterior = DiagonalGaussianDistribution(self._moments(sample))
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)


def _channels_last(x: Tensor) -> Tensor:
    """The layout in which oneDNN and cuDNN run 3D convs fastest and in which frames fold into the batch for free."""
    return x.contiguous(memory_format=torch.channels_last_3d)
