"""Video -> moments of the posterior."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .blocks import MidBlock, ResnetBlock, Stage, flatten
from .conv import CausalConv3d, StreamState, run
from .norm import NormKind, make_norm, norm_silu_pad
from .resample import Downsample, TimeDownsample
from .variants import Kind, conv_taps


class DownBlock(Stage):
    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, kind: Kind, norm: NormKind,
                 downsamplers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, kind=kind, norm=norm)
            for i in range(layers)])
        self.downsamplers = nn.ModuleList(downsamplers)

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class Encoder(nn.Module):
    """(B, 3, 1+4k, H, W) -> (B, 2c, 1+k, H/8, W/8) at four levels of which the two innermost halvings include time.

    `kinds` says which levels are 2D, pixels first. With `joint` one strided conv halves time and space; otherwise a
    `TimeDownsample` follows a 2D conv.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], *, layers: int, groups: int,
                 time_halvings: int, kinds: Sequence[Kind], norm: NormKind, joint: bool) -> None:
        super().__init__()
        last = len(widths) - 1
        first_taps, inner_taps = (conv_taps(kinds[level])[0] for level in (0, last))
        self.conv_in = CausalConv3d(in_channels, widths[0], 3, time_kernel=first_taps)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            time = level >= last - time_halvings
            taps = 3 if time else conv_taps(kinds[level])[0]
            down: list[nn.Module] = []
            if level < last and joint:
                down = [Downsample(width, time_kernel=taps, time=time)]
            elif level < last:
                down = [Downsample(width, time_kernel=1, time=False), *([TimeDownsample(width)] if time else [])]
            self.down_blocks.append(DownBlock(widths[max(level - 1, 0)], width, layers=layers, groups=groups,
                                              kind=kinds[level], norm=norm, downsamplers=down))
        self.mid_block = MidBlock(widths[-1], groups=groups, kind=kinds[-1], norm=norm)
        self.conv_norm_out = make_norm(norm, groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, 3, time_kernel=inner_taps)

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        body, end = state or (state, state)
        x, body = run([self.conv_in, *flatten([*self.down_blocks, self.mid_block])], x, body)
        x, end = norm_silu_pad(self.conv_norm_out, self.conv_out, x, end)
        return self.conv_out.convolve(x), (None if state is None else (body, end))
