"""The causal convolution that everything is built from, and its streaming state.

Every module in this package maps ``(x, state) -> (x, state)``. ``state`` is the module's streaming state:

- ``None``: the clip is whole; nothing is kept and ``None`` comes back.
- ``()``: a stream begins with this chunk.
- anything else: what the same module returned for the chunk before.

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

StreamState = Any  # None | () | Tensor | tuple of StreamState (a list: see `consume_state`): see the module's docstring


def run(layers: Sequence[nn.Module], x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Run `layers` one after the other, each with its own part of `state`."""
    states = state or (state,) * len(layers)
    new_states = []
    for i, layer in enumerate(layers):
        x, new_state = layer(x, states[i])
        new_states.append(new_state)
        if isinstance(states, list):
            states[i] = None
    return x, (None if state is None else tuple(new_states))


def consume_state(state: StreamState) -> StreamState:
    """The same state as something that is used up by the chunk that it is passed to: each part is let go as soon as it
    was used, so that old and new state never lie in memory together. For a loop that needs it no more."""
    return [consume_state(part) for part in state] if isinstance(state, tuple) and state else state


class CausalConv3d(nn.Conv3d):
    """Convolution over (time, height, width) whose output at frame t sees frames up to t only (OD-VAE, section 3.1).

    In time the first frame is repeated k_t - 1 times in front. In space a stride-1 kernel is padded by zeros on all
    sides and a stride-2 kernel by one zero on the right and at the bottom, as in the image VAE. With k_t = 1 this is a
    2D convolution of each frame.

    Streaming keeps the inputs that a later output still needs: at most k_t - 1 frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, time_kernel: int, stride: int = 1,
                 time_stride: int = 1) -> None:
        self.pad_after = stride - 1
        super().__init__(in_channels, out_channels, (time_kernel, kernel, kernel), (time_stride, stride, stride),
                         padding=(0, kernel // 2, kernel // 2) if stride == 1 else 0)

    def forward(self, x: Tensor, state: StreamState = None) -> tuple[Tensor, StreamState]:  # type: ignore[override]
        """(B, C, T, H, W) -> (B, C', 1 + (T-1)/time_stride, H/stride, W/stride) for a stream's first chunk or a whole
        clip, T/time_stride frames for a later chunk."""
        window, state = self.window(x, state)
        return self.convolve(window), state

    @property
    def time_padding(self) -> int:
        """Frames before a frame that its output sees."""
        return self.kernel_size[0] - 1

    def is_first_frame(self, x: Tensor, state: StreamState) -> bool:
        """Is `x` a clip's first frame by itself, which every tap sees?"""
        return x.shape[2] == 1 and not isinstance(state, Tensor)

    def window(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """(B, C, T, H, W) with all that its outputs see, frames in front and padding behind, and the next state."""
        if self.time_padding and not self.is_first_frame(x, state):
            before = state if isinstance(state, Tensor) else x[:, :, :1].expand(-1, -1, self.time_padding, -1, -1)
        else:
            before = x[:, :, :0]
        window = concat_pad(before, x, self.pad_after)
        return window, self.next_state(window[..., :x.shape[3], :x.shape[4]], state)

    def next_state(self, window: Tensor, state: StreamState) -> StreamState:
        """The state after a window: its last frames, which the next chunk's outputs see."""
        if state is None or not self.time_padding:
            return state
        if window.shape[2] == 1:
            return window.clone().expand(-1, -1, self.kernel_size[0] - self.stride[0], -1, -1)
        outputs = (window.shape[2] - self.kernel_size[0]) // self.stride[0] + 1
        return window[:, :, outputs * self.stride[0]:].clone()  # a view would hold the whole chunk

    def convolve(self, window: Tensor) -> Tensor:
        """The outputs of a window: (B, C, T, H, W) -> (B, C', (T - k_t) / time_stride + 1, H', W').

        A window of one frame is a clip's first frame alone; as every tap sees it, it is a 2D conv with the taps summed.
        """
        if window.shape[2] == 1 or not self.time_padding:
            kernel = self.weight.sum(2) if self.time_padding else self.weight.squeeze(2)
            return each_frame(window, kernel, self.bias, self.stride[1:], self.padding[1:])
        if self.stride == (1, 1, 1) and self.time_padding == 2 and winograd_pays(window, self.out_channels):
            return winograd_time_conv(window, self.weight, self.bias, self.padding[1:])
        return conv3d(window, self.weight, self.bias, self.stride, self.padding)


def each_frame(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    return unfold(F.conv2d(fold(x), weight, bias, stride, padding), len(x))


def fold(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W), channels last. For one frame or one clip a view whose strides aten takes for
    that layout; a reshaped one has the same values in the same places, but aten would copy it."""
    if x.shape[2] == 1:
        return x.squeeze(2)
    if len(x) == 1:
        return x.squeeze(0).transpose(0, 1)
    return rearrange(x.contiguous(memory_format=torch.channels_last_3d), "b c t h w -> (b t) c h w")


def unfold(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `fold`."""
    return frames.unsqueeze(2) if len(frames) == batch else rearrange(frames, "(b t) c h w -> b c t h w", b=batch)


def concat_pad(before: Tensor, x: Tensor, pad: int = 0) -> Tensor:
    """The frames of both, (B, C, T, H, W), with `pad` zeros on the right and at the bottom, by one copy; torch.cat
    leaves channels last where it is given a slice."""
    t = before.shape[2]
    if not t and not pad:
        return x
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        x = torch.cat([before, x], dim=2) if t else x
        return F.pad(x, (0, pad, 0, pad)) if pad else x
    channels, frames, height, width = x.shape[1:]
    out = empty(x, channels, t + frames, height + pad, width + pad)
    out[:, :, :t, :height, :width], out[:, :, t:, :height, :width] = before, x
    out[..., height:, :], out[..., width:] = 0, 0
    return out


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


WIDE = 256  # channels on both sides from which on `winograd_time_conv` wins by more than its sums cost
PIXELS = 2**9  # of all pairs of frames, from which on it wins by more than making its kernels costs


def winograd_pays(window: Tensor, out_channels: int) -> bool:
    b, c, t, h, w = window.shape
    return (min(c, out_channels) >= WIDE and b * (t // 2 - 1) * h * w >= PIXELS and window.device.type == "cpu"
            and window.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling())


def winograd_time_conv(window: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
    """A conv of three taps in time, two frames of output from four 2D convs instead of six: Winograd's F(2, 3) in time
    (Lavin and Gray 2016, section 4.1), exact but for rounding. A frame left over comes by the conv as it is, and first,
    as a clip's first frame streams alone: so whole and streamed round alike.

    (B, C, T, H, W) -> (B, C', T - 2, H, W).
    """
    outputs = window.shape[2] - 2
    alone = outputs % 2
    first, second, third, fourth = (window[:, :, alone + i:alone + outputs - 1 + i:2] for i in range(4))
    early, middle, late = weight.unbind(2)
    out = empty(window, len(weight), outputs, *window.shape[3:])
    even, odd = out[:, :, alone::2], out[:, :, alone + 1::2]

    def product(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return each_frame(x, kernel.contiguous(memory_format=torch.channels_last), bias, (1, 1), padding)

    even.copy_(product(first - third, early, bias))
    odd.copy_(product(fourth - second, late, bias))
    shared = product(second + third, (early + middle + late) / 2)
    even += shared
    odd += shared
    shared = product(third - second, (early - middle + late) / 2)
    even += shared
    odd -= shared
    if alone:
        out[:, :, :1] = conv3d(window[:, :, :3], weight, bias, (1, 1, 1), (0, *padding))
    return out


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised (B, *shape) with the batch, type and device of `like`, channels last."""
    return torch.empty(like.shape[0], *shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last_3d)


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h; the memory of `h` is used again where no gradient is wanted."""
    return x + h if torch.is_grad_enabled() else h.add_(x)
