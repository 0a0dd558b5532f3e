"""Residual block, attention and the base class of stages.

Attribute names are those of diffusers' AutoencoderKL, so that an image VAE's weights match by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conv import CausalConv3d, StreamState, add, run
from .norm import NormKind, make_norm, norm_silu_pad
from .variants import Kind, conv_taps


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the shortcut is a 1x1x1 conv where the width changes.

    In a block whose convs are all 2D, norm statistics are per frame whatever `norm` is.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, kind: Kind, norm: NormKind) -> None:
        super().__init__()
        first, second = conv_taps(kind)
        norm = "frame" if kind == "2d" else norm
        self.norm1 = make_norm(norm, groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, time_kernel=first)
        self.norm2 = make_norm(norm, groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, time_kernel=second)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, 1, time_kernel=1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        first, second = state or (state, state)
        h, first = norm_silu_pad(self.norm1, self.conv1, x, first)
        h = self.conv1.convolve(h)
        h, second = norm_silu_pad(self.norm2, self.conv2, h, second)
        h = self.conv2.convolve(h)
        if self.conv_shortcut is not None:
            x, _ = self.conv_shortcut(x)
        return add(x, h), (None if state is None else (first, second))


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame separately (the fixed form, `AttnBlock3DFix`)."""

    def __init__(self, channels: int, *, groups: int, norm: NormKind) -> None:
        super().__init__()
        self.group_norm = make_norm(norm, groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        b, _, _, h, w = x.shape
        tokens = rearrange(self.group_norm(x), "b c t h w -> (b t) 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "(b t) 1 (h w) c -> b c t h w", b=b, h=h, w=w), state


class Stage(nn.Module):
    """Layers that run in sequence; the unit that gradient checkpointing recomputes."""

    gradient_checkpointing = False  # this and the function are set by diffusers' enable_gradient_checkpointing
    _gradient_checkpointing_func: Callable[..., Tensor]

    def layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        """Recompute in the backward pass; for whole clips only."""
        return self._gradient_checkpointing_func(lambda x: run(self.layers(), x, None)[0], x), state


def flatten(stages: Iterable[Stage]) -> list[nn.Module]:
    """Return the layers of all stages, so that no input of a stage is held while its later layers run; a stage that
    uses gradient checkpointing stays whole."""
    return [layer for stage in stages for layer in (
        [stage] if stage.gradient_checkpointing and torch.is_grad_enabled() else stage.layers())]


class MidBlock(Stage):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, groups: int, kind: Kind, norm: NormKind) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups=groups, kind=kind, norm=norm) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups, norm=norm)])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], self.attentions[0], self.resnets[1]]
