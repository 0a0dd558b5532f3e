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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Past = Any  # None | () | Tensor | tuple of Past: see the module's docstring
NormKind = Literal["frame", "clip"]


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
        if self.kernel_size[0] == 1:
            return self.convolve(x), past
        if x.shape[2] == 1 and not isinstance(past, Tensor):
            return self._single(x), (past if past is None else self._repeat(x))
        window, past = self.window(x, past)
        return self.convolve(window), past

    def window(self, x: Tensor, past: Past) -> tuple[Tensor, Past]:
        """(B, C, T, H, W) with the frames in front that its outputs see, and the state for the next piece."""
        lead = self.kernel_size[0] - 1
        before = past if isinstance(past, Tensor) else x[:, :, :1].expand(-1, -1, lead, -1, -1)
        x = torch.cat([before, x], dim=2)
        return x, (None if past is None else self.kept(x))

    def kept(self, window: Tensor) -> Tensor:
        """The last frames of a window, which the next piece's outputs see."""
        outputs = (window.shape[2] - self.kernel_size[0]) // self.stride[0] + 1
        return window[:, :, outputs * self.stride[0]:].clone()  # a view would hold the whole piece

    def convolve(self, window: Tensor) -> Tensor:
        """Without padding in time: (B, C, T, H, W) -> (B, C', (T - k_t) / time_stride + 1, H', W')."""
        if any(self.pad_after):
            window = F.pad(window, self.pad_after)
        if self.kernel_size[0] == 1:
            return each_frame(window, self.weight[:, :, 0], self.bias, self.stride[1:], self.padding[1:])
        return conv3d(window, self.weight, self.bias, self.stride, self.padding)

    def _single(self, x: Tensor) -> Tensor:
        """A clip's first frame by itself: every tap sees the same frame, so it is a 2D conv with the taps summed."""
        if any(self.pad_after):
            x = F.pad(x, self.pad_after)
        return each_frame(x, self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:])

    def _repeat(self, x: Tensor) -> Tensor:
        return x.clone().expand(-1, -1, self.kernel_size[0] - self.stride[0], -1, -1)


def each_frame(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    frames = F.conv2d(rearrange(x, "b c t h w -> (b t) c h w"), weight, bias, stride, padding)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


SLOW_BELOW = 20480  # elements of B*C*T*H at or under which aten leaves oneDNN for its own slow_conv3d, batches under 16


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """F.conv3d, by oneDNN also for small float32 inputs on a CPU (measured up to 4 times as fast)."""
    b, c, t, h, _ = x.shape
    if (b * c * t * h <= SLOW_BELOW and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()):  # type: ignore[no-untyped-call]
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised (B, *shape) with the batch, type and device of `like`, channels last."""
    return torch.empty(like.shape[0], *shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last_3d)


class FrameNorm(nn.GroupNorm):
    """GroupNorm whose statistics are taken frame by frame, so that no frame can see a later one."""

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        return rearrange(super().forward(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=b)


class ClipNorm(nn.GroupNorm):
    """GroupNorm over time, height and width, as the public code has it in 3D blocks; not causal."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())  # channels last, aten sums naively: 20 times the rounding error


def make_norm(kind: NormKind, groups: int, channels: int) -> nn.GroupNorm:
    return (FrameNorm if kind == "frame" else ClipNorm)(groups, channels, eps=1e-6)


def norm_silu_conv(norm: nn.GroupNorm, conv: CausalConv3d, x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """conv(silu(norm(x))). Where no gradient is wanted, SiLU works in place, or writes straight into the window that
    the conv reads, so that neither it nor the padding in time costs a copy."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv(F.silu(norm(x)), past)
    lead = conv.kernel_size[0] - 1
    begins = not isinstance(past, Tensor)
    if not lead or (x.shape[2] == 1 and begins):
        return conv(F.silu(norm(x), inplace=True), past)
    c, t, h, w = x.shape[1:]
    window = empty(x, c, lead + t, h, w)
    torch.ops.aten.silu.out(norm(x), out=window[:, :, lead:])
    window[:, :, :lead] = window[:, :, lead:lead + 1] if begins else past
    past = None if past is None else conv.kept(window)
    return conv.convolve(window), past


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h; the memory of `h` is used again where no gradient is wanted."""
    return x + h if torch.is_grad_enabled() else h.add_(x)
