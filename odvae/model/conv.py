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

Past = Any  # None | () | Tensor | tuple of Past (a list: see `handed_over`): see the module's docstring
NormKind = Literal["frame", "clip"]


def run(layers: Sequence[nn.Module], x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Run `layers` one after the other, each with its own part of `past`."""
    pasts = past or (past,) * len(layers)
    kept = []
    for i, layer in enumerate(layers):
        x, state = layer(x, pasts[i])
        kept.append(state)
        if isinstance(pasts, list):
            pasts[i] = None
    return x, (None if past is None else tuple(kept))


def handed_over(past: Past) -> Past:
    """The same state as something that is used up by the piece that it is passed to: each part is let go as soon as it
    was used, so that old and new state never lie in memory together. For a loop that needs it no more."""
    return [handed_over(part) for part in past] if isinstance(past, tuple) and past else past


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
        window, past = self.window(x, past)
        return self.convolve(window), past

    @property
    def lead(self) -> int:
        """Frames before a frame that its output sees."""
        return self.kernel_size[0] - 1

    def alone(self, x: Tensor, past: Past) -> bool:
        """Is `x` a clip's first frame by itself, which every tap sees?"""
        return x.shape[2] == 1 and not isinstance(past, Tensor)

    def window(self, x: Tensor, past: Past) -> tuple[Tensor, Past]:
        """(B, C, T, H, W) with the frames in front that its outputs see, and the state for the next piece."""
        if not self.lead or self.alone(x, past):
            return x, self.kept(x, past)
        before = past if isinstance(past, Tensor) else x[:, :, :1].expand(-1, -1, self.lead, -1, -1)
        x = torch.cat([before, x], dim=2)
        return x, self.kept(x, past)

    def kept(self, window: Tensor, past: Past) -> Past:
        """The state after a window: its last frames, which the next piece's outputs see."""
        if past is None or not self.lead:
            return past
        if window.shape[2] == 1:
            return window.clone().expand(-1, -1, self.kernel_size[0] - self.stride[0], -1, -1)
        outputs = (window.shape[2] - self.kernel_size[0]) // self.stride[0] + 1
        return window[:, :, outputs * self.stride[0]:].clone()  # a view would hold the whole piece

    def convolve(self, window: Tensor) -> Tensor:
        """The outputs of a window: (B, C, T, H, W) -> (B, C', (T - k_t) / time_stride + 1, H', W').

        A window of one frame is a clip's first frame alone; as every tap sees it, it is a 2D conv with the taps summed.
        """
        if any(self.pad_after):
            window = F.pad(window, self.pad_after)
        if window.shape[2] == 1 or not self.lead:
            return each_frame(window, self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:])
        return conv3d(window, self.weight, self.bias, self.stride, self.padding)


def each_frame(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    frames = F.conv2d(rearrange(x, "b c t h w -> (b t) c h w"), weight, bias, stride, padding)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
SLOW_BELOW = 20480  # elements of B*C*T*H at or under which aten leaves oneDNN for its own slow_conv3d, batches under 16


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """F.conv3d, by oneDNN also for small float32 inputs on a CPU (measured up to 4 times as fast)."""
    b, c, t, h, _ = x.shape
    if (b * c * t * h <= SLOW_BELOW and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and type(x) is Tensor  # and not one without values, which oneDNN cannot take
            and ONEDNN and not torch.compiler.is_compiling()):
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


FRAME_BY_FRAME = 2**20  # values of a frame from which on norms work frame by frame: memory then counts, not the calls


def norm_silu_window(norm: nn.GroupNorm, conv: CausalConv3d, x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """The window of `conv` on silu(norm(x)), for `conv.convolve`, and the next state.

    Where no gradient is wanted SiLU works in place, or writes straight into the window, so that neither it nor the
    padding in time costs a copy.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv.window(F.silu(norm(x)), past)
    if not conv.lead or conv.alone(x, past):
        h = F.silu(norm(x), inplace=True)
        return h, conv.kept(h, past)
    channels, t, height, width = x.shape[1:]
    window = empty(x, channels, conv.lead + t, height, width)
    later = window[:, :, conv.lead:]
    at_once = 1 if isinstance(norm, FrameNorm) and channels * height * width >= FRAME_BY_FRAME else t
    for piece, place in zip(x.split(at_once, dim=2), later.split(at_once, dim=2), strict=True):
        torch.ops.aten.silu.out(norm(piece), out=place)
    window[:, :, :conv.lead] = past if isinstance(past, Tensor) else later[:, :, :1]
    return window, conv.kept(window, past)


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h; the memory of `h` is used again where no gradient is wanted."""
    return x + h if torch.is_grad_enabled() else h.add_(x)
