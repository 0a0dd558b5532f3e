"""A small causal decoder that is distilled from a video VAE's: 2D convs, of which some see the frame before as well.

Of the kind of TAEHV (github.com/madebyollin/taehv): no norm, no attention, residual blocks with a memory of one frame,
and frames and pixels that are unfolded from channels. Unlike there a clip's first frame stands for the one before it,
as in the OD-VAE, so that the first latent decodes to one frame and streams need no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from ..utils.errors import UserError
from .conv import CausalConv3d, StreamState, add, consume_state, empty, run, tuned_convs
from .outputs import DecoderOutput
from .shapes import ShapeMixin, unpatchify
from .tiling import Tiling


class MemoryBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))). The first conv is 2D over a frame and the one before it, the second 2D."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, 3, time_kernel=2)
        self.conv2 = CausalConv3d(channels, channels, 3, time_kernel=1)
        nn.init.zeros_(self.conv2.weight)  # the identity at first, as nothing is normalized

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        padded, state = _relu_pad(self.conv1, x, state)
        h, _ = self.conv2(_relu(self.conv1.convolve(padded)))
        return add(x, h), state


def _relu(x: Tensor) -> Tensor:
    """relu(x); reuses the memory of `x` if no gradient is needed."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def _relu_pad(conv: CausalConv3d, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Return relu(x) with the frame before it, for `conv.convolve`, and the next state; in one pass if no gradient is
    needed."""
    if torch.is_grad_enabled() or conv.is_first_frame(x, state):
        return conv.causal_pad(F.relu(x), state)
    padded = empty(x, x.shape[1], x.shape[2] + 1, *x.shape[3:])
    torch.clamp_min(x, 0, out=padded[:, :, 1:])
    padded[:, :, :1] = state if isinstance(state, Tensor) else padded[:, :, 1:2]
    return padded, conv.next_state(padded, state)


class Growth(nn.Module):
    """Unfold channels into `time` frames and `space` x `space` pixels: (B, C, T, H, W) -> (B, C', 1 + time (T - 1),
    space H, space W). A clip's first frame yields one frame, the last of its `time`.

    The streaming state is `True` once a stream has begun.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = CausalConv3d(in_channels, out_channels * time * space**2, 1, time_kernel=1)

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        out = rearrange(self.conv(x)[0], "b (c f p q) t h w -> b c (t f) (h p) (w q)", f=self.time, p=self.space,
                        q=self.space)
        if not state:
            out = out[:, :, self.time - 1:]
        return out.contiguous(memory_format=torch.channels_last_3d), None if state is None else True


class DistilledDecoder(ShapeMixin, ModelMixin, ConfigMixin):
    """Decodes a video VAE's raw latents several times as fast as its own decoder, nearly as well; trained by
    `odvae distill`.

    In place of the VAE's: `decode`, `decode_chunk` and `odvae.decode_stream` are those of `AutoencoderKLODVAE`, and
    chunks are the same values as the whole, to rounding.

    Args:
        latent_channels: channels of the latent.
        out_channels: channels of the video.
        temporal_compression, spatial_compression: frames of a latent (of the first, one) and pixels a side.
        widths: channels of each level, latents first.
        blocks: `MemoryBlock`s of each level.
        time_growth, space_growth: frames that a frame becomes, and pixels a side that a pixel becomes, between two
            levels. The product of `time_growth` is `temporal_compression`; what `space_growth` leaves of
            `spatial_compression` is unfolded after the last conv.
        latents_mean, latents_std: statistics of the raw latents, per channel, by which they are normalized first. None
            stands for 0 and 1.
        vae_fingerprint: of the VAE that it was distilled from, for the record.

    Raises:
        UserError: levels that do not fit each other or the compression.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["MemoryBlock"]  # noqa: RUF012  (diffusers' contract)
    causal = True
    compiled = False  # see `compilation.even_parts`

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        out_channels: int = 3,
        temporal_compression: int = 4,
        spatial_compression: int = 8,
        widths: Sequence[int] = (64, 48, 48),
        blocks: Sequence[int] = (2, 1, 2),
        time_growth: Sequence[int] = (2, 2),
        space_growth: Sequence[int] = (1, 2),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        vae_fingerprint: str = "",
    ) -> None:
        super().__init__()
        check_levels(temporal_compression, spatial_compression, widths, blocks, time_growth, space_growth)
        self.patch_size = spatial_compression // math.prod(space_growth)
        self.conv_in = CausalConv3d(latent_channels, widths[0], 3, time_kernel=1)
        levels: list[nn.Module] = [MemoryBlock(widths[0]) for _ in range(blocks[0])]
        for i, (time, space) in enumerate(zip(time_growth, space_growth, strict=True)):
            levels += [Growth(widths[i], widths[i + 1], time=time, space=space),
                       *(MemoryBlock(widths[i + 1]) for _ in range(blocks[i + 1]))]
        self.levels = nn.ModuleList(levels)
        self.conv_out = CausalConv3d(widths[-1], out_channels * self.patch_size**2, 3, time_kernel=1)
        self.use_tiling, self.tiling = False, Tiling(512, 512, 128)  # `enable_tiling` is not needed: see `ShapeMixin`

    @property
    def temporal_compression_ratio(self) -> int:
        return int(self.config.temporal_compression)

    @property
    def spatial_compression_ratio(self) -> int:
        return int(self.config.spatial_compression)

    def _normalize(self, raw: Tensor) -> Tensor:
        channels = self.latent_channels
        mean, std = (raw.new_tensor(list(values)).view(1, -1, 1, 1, 1) for values in (
            self.config.latents_mean or [0.0] * channels, self.config.latents_std or [1.0] * channels))
        return (raw - mean) / std

    def decode_chunk(self, z: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        """Chunk of raw latents (B, c, t, h, w) -> video chunk (B, 3, t', 8h, 8w) and the state for the next chunk."""
        with tuned_convs(z, state):
            x = self._normalize(z).contiguous(memory_format=torch.channels_last_3d)
            x, _ = self.conv_in(x)
            x, state = run(list(self.levels), x, state)
            x, _ = self.conv_out(_relu(x))
        return unpatchify(x, self.patch_size), state

    def decode(self, z: Tensor, return_dict: bool = True,
               generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (B, c, 1+k, h, w) -> video (B, 3, 1+4k, 8h, 8w), about [-1, 1]. Nothing is drawn: `generator` is
        there as in diffusers' VAEs. Where no gradient is needed, a long clip is decoded in chunks, in less memory."""
        self.check_latents(z)
        if torch.is_grad_enabled():
            video = self.decode_chunk(z)[0]
        else:
            parts: list[Tensor] = []
            state: StreamState = ()
            for chunk in z.split(self.chunk_latents(*z.shape[3:]), dim=2):
                state = consume_state(state)
                part, state = self.decode_chunk(chunk, state)
                parts.append(part)
            video = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(self, z: Tensor) -> Tensor:
        """`decode` to a tensor."""
        (video,) = self.decode(z, return_dict=False)
        return video


def check_levels(temporal_compression: int, spatial_compression: int, widths: Sequence[int], blocks: Sequence[int],
                 time_growth: Sequence[int], space_growth: Sequence[int]) -> None:
    """Raise UserError for levels that do not fit each other or the compression."""
    levels: dict[str, Any] = {"blocks": blocks, "time_growth": time_growth, "space_growth": space_growth}
    for name, values in levels.items():
        count = len(widths) - (name != "blocks")
        if len(values) != count:
            raise UserError(f"{name} {list(values)} must have {count} values with {len(widths)} levels (widths "
                            f"{list(widths)})")
    if math.prod(time_growth) != temporal_compression:
        raise UserError(f"time_growth {list(time_growth)} must multiply to the VAE's temporal compression, "
                        f"{temporal_compression}")
    if spatial_compression % math.prod(space_growth):
        raise UserError(f"space_growth {list(space_growth)} must multiply to a divisor of the VAE's spatial "
                        f"compression, {spatial_compression}")
