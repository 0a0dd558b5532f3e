"""The causal convolution that everything is built from, and its streaming state.

Every module in this package maps ``(x, past) -> (x, past)``. ``past`` is the module's streaming state:

- ``None``: the clip is whole; nothing is kept and ``None`` comes back.
- ``()``: a stream begins with this piece.
- anything else: what the same module returned for the piece before.

So a stream's state is a value that is passed in and handed back, never an attribute of the model, and one model can
serve any number of streams at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Past = Any  # None | () | Tensor | tuple of Past: see the module's docstring


def run(layers: Sequence[nn.Module], x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Run `layers` one after the other, each with its own part of `past`."""
    pasts = past or (past,) * len(layers)
    kept = []
    for layer, p in zip(layers, pasts, strict=True):
        x, p = layer(x, p)
        kept.append(p)
    return x, (None if past is None else tuple(kept))


class CausalConv3d(nn.Conv3d):
    """Convolution over (time, height, width) whose output at frame t sees frames up to t only (OD-VAE, section 3.1).

    In time the first frame is repeated k_t - 1 times in front. In space a stride-1 kernel is padded by zeros on all
    sides and a stride-2 kernel by one zero on the right and at the bottom, as in the image VAE. With k_t = 1 this is a
    2D convolution of each frame.

    Streaming keeps the inputs that a later output still needs: at most k_t - 1 frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, time_kernel: int, stride: int = 1,
                 time_stride: int = 1) -> None:
        self.pad_after = (0, stride - 1, 0, stride - 1)
        super().__init__(in_channels, out_channels, (time_kernel, kernel, kernel), (time_stride, stride, stride),
                         padding=(0, kernel // 2, kernel // 2) if stride == 1 else 0)

    def forward(self, x: Tensor, past: Past = None) -> tuple[Tensor, Past]:  # type: ignore[override]
        """(B, C, T, H, W) -> (B, C', 1 + (T-1)/time_stride, H/stride, W/stride) for a stream's first piece or a whole
        clip, T/time_stride frames for a later piece."""
        if any(self.pad_after):
            x = F.pad(x, self.pad_after)
        k_t, s_t = self.kernel_size[0], self.stride[0]
        if k_t == 1:
            b = x.shape[0]
            frames = F.conv2d(rearrange(x, "b c t h w -> (b t) c h w"), self.weight[:, :, 0], self.bias,
                              self.stride[1:], self.padding[1:])  # type: ignore[arg-type]
            return rearrange(frames, "(b t) c h w -> b c t h w", b=b), past
        before = past if isinstance(past, Tensor) else x[:, :, :1].expand(-1, -1, k_t - 1, -1, -1)
        x = torch.cat([before, x], dim=2)
        if past is not None:
            outputs = (x.shape[2] - k_t) // s_t + 1
            past = x[:, :, outputs * s_t:].clone()  # a view would hold the whole piece
        return super().forward(x), past


class FrameNorm(nn.GroupNorm):
    """GroupNorm whose statistics are taken frame by frame, so that no frame can see a later one."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        return rearrange(super().forward(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=b)
