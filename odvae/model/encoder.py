"""Video -> moments of the posterior."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, MidBlock, ResnetBlock, Stage
from .conv import CausalConv3d, FrameNorm, Past, run
from .variants import time_kernels


class DownBlock(Stage):
    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, time_kernel: int,
                 downsample: Downsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, time_kernel=time_kernel)
            for i in range(layers)])
        self.downsamplers = nn.ModuleList([downsample] if downsample is not None else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class Encoder(nn.Module):
    """(B, 3, 1+4k, H, W) -> (B, 2c, 1+k, H/8, W/8) at four levels of which the two innermost halvings include time."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], *, layers: int, groups: int,
                 time_halvings: int, outer_2d: bool) -> None:
        super().__init__()
        kernels = time_kernels(len(widths), outer_2d)
        halvings = len(widths) - 1
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, time_kernel=kernels[0])
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            time = level >= halvings - time_halvings
            kernel = 3 if time else kernels[level]
            down = None if level == halvings else Downsample(width, time_kernel=kernel, time=time)
            self.down_blocks.append(DownBlock(widths[max(level - 1, 0)], width, layers=layers, groups=groups,
                                              time_kernel=kernels[level], downsample=down))
        self.mid_block = MidBlock(widths[-1], groups=groups, time_kernel=3)
        self.conv_norm_out = FrameNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3, time_kernel=3)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        begin, blocks, end = past or (past,) * 3
        x, begin = self.conv_in(x, begin)
        x, blocks = run([*self.down_blocks, self.mid_block], x, blocks)
        x, end = self.conv_out(F.silu(self.conv_norm_out(x)), end)
        return x, (None if past is None else (begin, blocks, end))
