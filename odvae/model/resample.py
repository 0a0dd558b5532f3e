"""Down- and upsampling in space and time."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import CausalConv3d, StreamState, concat_pad, conv3d, each_frame, empty, is_hooked

UpsampleMode = Literal["nearest", "trilinear"]


class Downsample(nn.Module):
    """Halve height and width by a strided conv; with `time` also the frames: 1 + 2k frames become 1 + k."""

    def __init__(self, channels: int, *, time_kernel: int, time: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=time_kernel, stride=2, time_stride=1 + time)

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        return self.conv(x, state)


class TimeDownsample(nn.Module):
    """Halve the frames after space was halved: a * mean of three frames + (1 - a) * strided causal conv, a =
    sigmoid(mix_factor) (v1.1 of the public code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=3, time_stride=2)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        padded, state = self.conv.causal_pad(x, state)
        mean = F.avg_pool3d(padded, (min(3, padded.shape[2]), 1, 1), (2, 1, 1))  # a first frame alone is its own mean
        return torch.lerp(self.conv.convolve(padded), mean, self.mix_factor.sigmoid()), state


def _interpolate(x: Tensor, state: StreamState, mode: UpsampleMode, space: int) -> tuple[Tensor, StreamState]:
    """Double the frames of (B, C, T, H, W) except a clip's first, and height and width if `space` is 2. Two more frames
    in front pad it for a causal conv with three taps. The state is the last frame."""
    if mode == "nearest":
        is_start = not isinstance(state, Tensor)
        padded = concat_pad(x[:, :, :1] if is_start else state, x)
        padded = F.interpolate(padded, scale_factor=(2.0, float(space), float(space)), mode="nearest")
        return padded[:, :, 1:] if is_start else padded, (None if state is None else x[:, :, -1:].clone())
    first, later = x[:, :, :1], x[:, :, 1:]  # interpolated separately: no later frame leaks into the first
    parts = [F.interpolate(first, scale_factor=(1.0, float(space), float(space)), mode="trilinear")] * 3
    if later.shape[2]:
        parts.append(F.interpolate(later, scale_factor=(2.0, float(space), float(space)), mode="trilinear"))
    return torch.cat(parts, dim=2), state


class Upsample(nn.Module):
    """Double height and width, then convolve; with `time` also double the frames except a clip's first: 1 + k frames
    become 1 + 2k. Space alone is doubled by nearest neighbour in both modes, as in the public code.

    With mode "trilinear" a frame depends on the next one, so it cannot be streamed.
    """

    def __init__(self, channels: int, *, time_kernel: int, time: bool, mode: UpsampleMode = "nearest") -> None:
        super().__init__()
        self.time, self.mode = time, mode
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=time_kernel)
        self.fused = False

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        if self.fused and not torch.is_grad_enabled() and not is_hooked(self.conv):
            return self._subpixel(x, state)
        if not self.time:
            return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"), state)
        padded, state = _interpolate(x, state, self.mode, 2)
        return self.conv.convolve(padded), state

    def fuse(self) -> None:
        """Fuse upsampling and conv if no gradient is needed: each phase of the output (2 in time, 2x2 in space) is a
        conv of the small input whose kernel sums the taps that fall on the same pixel: 8 taps for 27, 4 for 9. Every
        call computes the kernels from the current weight.

        Not for mode "trilinear", nor for a 3D conv after upsampling in space alone."""
        self.fused = self.mode == "nearest" if self.time else self.conv.kernel_size[0] == 1

    def unfuse(self) -> None:
        """Undo `fuse`."""
        self.fused = False

    def _subpixel(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        kernel, bias, channels = subpixel_kernel(self.conv.weight), self.conv.bias, self.conv.out_channels
        is_start = not isinstance(state, Tensor)
        t, h, w = x.shape[2:]
        phases = len(kernel)
        out = empty(x, channels, phases * t, 2 * h, 2 * w)
        single = self.time and is_start and t == 1  # both taps in time see the one frame
        if self.time and not single:
            padded = concat_pad(x[:, :, :1] if is_start else state, x)
        else:
            padded = x
        for phase, weight in enumerate(kernel):  # in time; holds the kernels of the four phases in space
            if single and not phase:
                continue  # the first frame's second copy is the one that counts
            repeated = None if bias is None else bias.repeat(4)
            if self.time and not single:
                result = conv3d(padded, weight, repeated, (1, 1, 1), (0, 1, 1))
            else:
                result = each_frame(padded, weight.sum(2), repeated, (1, 1), (1, 1))
            for corner, part in enumerate(result.split(channels, dim=1)):
                i, j = divmod(corner, 2)
                out[:, :, phase::phases, i::2, j::2] = part[..., i:i + h, j:j + w]
        if self.time:
            state = None if state is None else x[:, :, -1:].clone()
            return (out[:, :, 1:] if is_start else out), state
        return out, state


class TimeUpsample(nn.Module):
    """Double the frames except a clip's first after space was doubled: a * x + (1 - a) * causal conv of x, x being
    interpolated in time, a = sigmoid(mix_factor) (v1.1 of the public code)."""

    def __init__(self, channels: int, *, mode: UpsampleMode) -> None:
        super().__init__()
        self.mode = mode
        self.conv = CausalConv3d(channels, channels, 3, time_kernel=3)
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:
        padded, state = _interpolate(x, state, self.mode, 1)
        return torch.lerp(self.conv.convolve(padded), padded[:, :, 2:], self.mix_factor.sigmoid()), state


def subpixel_kernel(weight: Tensor) -> Tensor:
    """Kernel (O, I, k_t, 3, 3) of a conv after nearest upsampling -> (1 or 2, 4 O, I, 1 or 2, 2, 2), channels last: for
    each phase of the output in time a kernel on the small input that computes all four phases in space at once.
    """
    sums, shape = SUBPIXEL_SUMS[weight.shape[2]]
    kernels = (weight.flatten(2) @ weight.new_tensor(sums)).unflatten(2, shape)  # (O, I, a, b, c, s, u, v)
    return kernels.permute(2, 3, 4, 0, 5, 6, 7, 1).flatten(1, 3).contiguous().movedim(-1, 2)


def _subpixel_sums(time_kernel: int) -> tuple[list[list[float]], tuple[int, ...]]:
    """Return which taps of (k_t, 3, 3) are summed, (9 k_t, N) of 0 and 1, and the shape of N: phases in time, height
    and width, taps in time, height and width.

    In space output 2i + a sees inputs (2i + a + k - 1) // 2, k = 0, 1, 2. In time, causal and with a clip's first frame
    single, the two frames upsampled from latent frame j see j - 1 and j.
    """
    space = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], float)  # phase, tap of two, tap of three
    time = space[::-1] if time_kernel == 3 else np.ones((1, 1, 1))
    sums = np.einsum("ast,buh,cvw->thwabcsuv", time, space, space)
    return sums.reshape(9 * time_kernel, -1).tolist(), sums.shape[3:]


SUBPIXEL_SUMS = {time_kernel: _subpixel_sums(time_kernel) for time_kernel in (1, 3)}
