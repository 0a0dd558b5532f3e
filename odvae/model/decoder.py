"""Latent -> video."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import MidBlock, ResnetBlock, Stage, Upsample
from .conv import CausalConv3d, FrameNorm, Past, run
from .variants import time_kernels


class UpBlock(Stage):
    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, time_kernel: int,
                 upsample: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, time_kernel=time_kernel)
            for i in range(layers)])
        self.upsamplers = nn.ModuleList([upsample] if upsample is not None else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class Decoder(nn.Module):
    """(B, c, 1+k, H/8, W/8) -> (B, 3, 1+4k, H, W). `up_blocks` run from the innermost level to the pixels."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], *, layers: int, groups: int,
                 time_halvings: int, outer_2d: bool) -> None:
        super().__init__()
        kernels = time_kernels(len(widths), outer_2d)
        halvings = len(widths) - 1
        self.conv_in = CausalConv3d(in_channels, widths[-1], 3, time_kernel=3)
        self.mid_block = MidBlock(widths[-1], groups=groups, time_kernel=3)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            time = level > halvings - time_halvings  # undoes the halving that entered this level
            # Doubling space alone is followed by a (1, 3, 3) conv.
            up = None if level == 0 else Upsample(widths[level], time_kernel=3 if time else 1, time=time)
            self.up_blocks.append(UpBlock(widths[min(level + 1, halvings)], widths[level], layers=layers, groups=groups,
                                          time_kernel=kernels[level], upsample=up))
        self.conv_norm_out = FrameNorm(groups, widths[0], eps=1e-6)
        self.conv_out = CausalConv3d(widths[0], out_channels, 3, time_kernel=kernels[0])

    def forward(self, z: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        begin, blocks, end = past or (past,) * 3
        x, begin = self.conv_in(z, begin)
        x, blocks = run([self.mid_block, *self.up_blocks], x, blocks)
        x, end = self.conv_out(F.silu(self.conv_norm_out(x)), end)
        return x, (None if past is None else (begin, blocks, end))
