"""Latent -> video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .blocks import MidBlock, ResnetBlock, Stage, flatten
from .conv import CausalConv3d, StreamState, run
from .norm import NormKind, make_norm, norm_silu_pad
from .resample import TimeUpsample, Upsample, UpsampleMode
from .variants import Kind, conv_taps


class UpBlock(Stage):
    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, kind: Kind, norm: NormKind,
                 upsamplers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, kind=kind, norm=norm)
            for i in range(layers)])
        self.upsamplers = nn.ModuleList(upsamplers)

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class Decoder(nn.Module):
    """(B, c, 1+k, H/8, W/8) -> (B, 3, 1+4k, H, W). `up_blocks` run from the innermost level to the pixels; `kinds` are
    pixels first. `joint`: see `Encoder`."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], *, layers: int, groups: int,
                 time_halvings: int, kinds: Sequence[Kind], norm: NormKind, upsample: UpsampleMode,
                 joint: bool) -> None:
        super().__init__()
        last = len(widths) - 1
        first_taps, inner_taps = (conv_taps(kinds[level])[0] for level in (0, last))
        self.conv_in = CausalConv3d(in_channels, widths[-1], 3, time_kernel=inner_taps)
        self.mid_block = MidBlock(widths[-1], groups=groups, kind=kinds[-1], norm=norm)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            time = level > last - time_halvings  # undoes the halving that entered this level
            up: list[nn.Module] = []
            taps = 3 if kinds[level] == "all" else 1  # of the conv after a doubling of space alone
            if level and joint:
                up = [Upsample(widths[level], time_kernel=3 if time else taps, time=time, mode=upsample)]
            elif level:
                up = [Upsample(widths[level], time_kernel=1, time=False),
                      *([TimeUpsample(widths[level], mode=upsample)] if time else [])]
            self.up_blocks.append(UpBlock(widths[min(level + 1, last)], widths[level], layers=layers, groups=groups,
                                          kind=kinds[level], norm=norm, upsamplers=up))
        out_norm: NormKind = "frame" if kinds[0] == "2d" else norm
        self.conv_norm_out = make_norm(out_norm, groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out_channels, 3, time_kernel=first_taps)

    def forward(self, z: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        body, end = state or (state, state)
        x, body = run([self.conv_in, *flatten([self.mid_block, *self.up_blocks])], z, body)
        x, end = norm_silu_pad(self.conv_norm_out, self.conv_out, x, end)
        return self.conv_out.convolve(x), (None if state is None else (body, end))
