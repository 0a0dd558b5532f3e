"""Residual block, attention, down- and upsampling. Attribute names are those of diffusers' AutoencoderKL, so that an
image VAE's weights find their place by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conv import CausalConv3d, FrameNorm, Past, run


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the shortcut is a 1x1x1 conv where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, time_kernel: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(groups, in_channels, eps=1e-6)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, time_kernel=time_kernel)
        self.norm2 = FrameNorm(groups, out_channels, eps=1e-6)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, time_kernel=time_kernel)
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, 1, time_kernel=1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        first, second = past or (past, past)
        h, first = self.conv1(F.silu(self.norm1(x)), first)
        h, second = self.conv2(F.silu(self.norm2(h)), second)
        if self.conv_shortcut is not None:
            x, _ = self.conv_shortcut(x)
        return x + h, (None if past is None else (first, second))


class SpatialAttention(nn.Module):
    """One-head attention over the pixels of each frame by itself (the fixed form, `AttnBlock3DFix`)."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        b, _, _, h, w = x.shape
        tokens = rearrange(self.group_norm(rearrange(x, "b c t h w -> (b t) c h w")), "n c h w -> n 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](out), "(b t) 1 (h w) c -> b c t h w", b=b, h=h, w=w), past


class Stage(nn.Module):
    """Layers that run one after the other; what gradient checkpointing recomputes in one piece."""

    gradient_checkpointing = False  # this and the function are set by diffusers' enable_gradient_checkpointing
    _gradient_checkpointing_func: Callable[..., Tensor]

    def layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        if self.gradient_checkpointing and past is None and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(lambda x: run(self.layers(), x, None)[0], x), None
        return run(self.layers(), x, past)


class MidBlock(Stage):
    """block, attention, block."""

    def __init__(self, channels: int, *, groups: int, time_kernel: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups=groups, time_kernel=time_kernel) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups)])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


class Downsample(nn.Module):
    """Halve height and width by a strided conv; with `time` also the frames: 1 + 2k of them become 1 + k."""

    def __init__(self, channels: int, *, time_kernel: int, time: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=time_kernel, stride=2, time_stride=1 + time)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        return self.conv(x, past)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then a conv; with `time` also the frames, except that a clip's
    first frame stays single: 1 + k frames become 1 + 2k."""

    def __init__(self, channels: int, *, time_kernel: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=time_kernel)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        if not self.time:
            return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"), past)
        begins = not isinstance(past, Tensor)
        x = F.interpolate(x, scale_factor=(2.0, 2.0, 2.0), mode="nearest")
        return self.conv(x[:, :, 1:] if begins else x, past)
