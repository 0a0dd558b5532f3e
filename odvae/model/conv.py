"""The causal convolution that everything is built from, and its streaming state.

Every module in this package maps ``(x, state) -> (x, state)``. ``state`` is the module's streaming state:

- ``None``: the clip is whole; nothing is kept and ``None`` is returned.
- ``()``: a stream starts with this chunk.
- anything else: what the same module returned for the previous chunk.

So a stream's state is an argument and a return value, never an attribute of the model, and one model can serve any
number of streams at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

StreamState = Any  # None | () | Tensor | tuple of StreamState (a list: see `consume_state`): see the module's docstring


def run(layers: Sequence[nn.Module], x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Run `layers` in sequence, each with its own part of `state`."""
    states = state or (state,) * len(layers)
    new_states = []
    for i, layer in enumerate(layers):
        x, new_state = layer(x, states[i])
        new_states.append(new_state)
        if isinstance(states, list):
            states[i] = None
    return x, (None if state is None else tuple(new_states))


def consume_state(state: StreamState) -> StreamState:
    """Return `state` in a form that the next chunk consumes: each part is freed as soon as it is used, so that old and
    new state are never in memory together. For loops that do not need the old state again."""
    return [consume_state(part) for part in state] if isinstance(state, tuple) and state else state


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook runs before the module's `forward`, such as those of offloading and casting, so that its weights
    cannot be read outside. Hooks of accelerate and diffusers replace `forward`."""
    state = module.__dict__
    return "forward" in state or bool(state["_forward_pre_hooks"]) or bool(state["_forward_hooks"])


class CausalConv3d(nn.Conv3d):
    """Convolution over (time, height, width) whose output at frame t sees frames up to t only (OD-VAE, section 3.1).

    In time the first frame is repeated k_t - 1 times in front. In space a stride-1 kernel is zero-padded on all sides
    and a stride-2 kernel by one zero on the right and at the bottom, as in the image VAE. With k_t = 1 this is a 2D
    convolution of each frame.

    The streaming state is the inputs that later outputs still need: at most k_t - 1 frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, time_kernel: int, stride: int = 1,
                 time_stride: int = 1) -> None:
        self.pad_after = stride - 1
        super().__init__(in_channels, out_channels, (time_kernel, kernel, kernel), (time_stride, stride, stride),
                         padding=(0, kernel // 2, kernel // 2) if stride == 1 else 0)

    def forward(self, x: Tensor, state: StreamState = None, *,  # type: ignore[override]
                padded: bool = False) -> tuple[Tensor, StreamState]:
        """(B, C, T, H, W) -> (B, C', 1 + (T-1)/time_stride, H/stride, W/stride) for a stream's first chunk or a whole
        clip, T/time_stride frames for a later chunk. `padded`: `x` has its padding already."""
        if not padded:
            x, state = self.causal_pad(x, state)
        return self._convolve(x), state

    @property
    def time_padding(self) -> int:
        """Earlier frames that an output sees."""
        return self.kernel_size[0] - 1

    def is_first_frame(self, x: Tensor, state: StreamState) -> bool:
        """Whether `x` is a clip's first frame alone, which every tap sees."""
        return x.shape[2] == 1 and not isinstance(state, Tensor)

    def causal_pad(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Return (B, C, T, H, W) with all inputs of its outputs, earlier frames and padding, and the next state."""
        if self.time_padding and not self.is_first_frame(x, state):
            before = state if isinstance(state, Tensor) else x[:, :, :1].expand(-1, -1, self.time_padding, -1, -1)
        else:
            before = x[:, :, :0]
        padded = concat_pad(before, x, self.pad_after)
        return padded, self.next_state(padded[..., :x.shape[3], :x.shape[4]], state)

    def next_state(self, padded: Tensor, state: StreamState) -> StreamState:
        """Return the state after a padded input: its last frames, which the next chunk's outputs see."""
        if state is None or not self.time_padding:
            return state
        if padded.shape[2] == 1:
            kept = padded.clone().expand(-1, -1, self.kernel_size[0] - self.stride[0], -1, -1)
            return in_one_layout(kept) if torch.compiler.is_compiling() else kept
        outputs = (padded.shape[2] - self.kernel_size[0]) // self.stride[0] + 1
        kept = padded[:, :, outputs * self.stride[0]:]
        # A view would hold the whole chunk.
        return in_one_layout(kept) if torch.compiler.is_compiling() else kept.clone()

    def convolve(self, padded: Tensor) -> Tensor:
        """Convolve a padded input: (B, C, T, H, W) -> (B, C', (T - k_t) / time_stride + 1, H', W')."""
        if is_hooked(self):  # the hook brings the weights in, or casts them
            out: Tensor = self(padded, padded=True)[0]
            return out
        return self._convolve(padded)

    def _convolve(self, padded: Tensor) -> Tensor:
        """One frame is a clip's first frame alone: every tap sees it, so this is a 2D conv with the taps summed."""
        if padded.shape[2] == 1 or not self.time_padding:
            kernel = self.weight.sum(2) if self.time_padding else self.weight.squeeze(2)
            return each_frame(padded, kernel, self.bias, self.stride[1:], self.padding[1:])
        if self.stride == (1, 1, 1) and self.time_padding == 2 and winograd_pays(padded, self.out_channels):
            return winograd_time_conv(padded, self.weight, self.bias, self.padding[1:])
        return conv3d(padded, self.weight, self.bias, self.stride, self.padding)


def in_one_layout(state: Tensor) -> Tensor:
    """Copy a state so that each chunk's has the same strides: else a later one would need a graph of its own."""
    return state.clone(memory_format=torch.channels_last_3d)


def each_frame(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    return unfold(F.conv2d(fold(x), weight, bias, stride, padding), len(x))


def fold(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W), channels last. For one frame or one clip this is a view whose strides aten
    recognises as that layout; aten would copy a reshaped tensor with the same memory layout."""
    if x.shape[2] == 1:
        return x.squeeze(2)
    if len(x) == 1:
        return x.squeeze(0).transpose(0, 1)
    return rearrange(x.contiguous(memory_format=torch.channels_last_3d), "b c t h w -> (b t) c h w")


def unfold(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `fold`."""
    return frames.unsqueeze(2) if len(frames) == batch else rearrange(frames, "(b t) c h w -> b c t h w", b=batch)


def concat_pad(before: Tensor, x: Tensor, pad: int = 0) -> Tensor:
    """Concatenate (B, C, T, H, W) in time and pad by `pad` zeros on the right and at the bottom, in one copy; torch.cat
    drops channels last when given a slice."""
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
SLOW_BELOW = 20480  # elements of B*C*T*H up to which aten uses its own slow_conv3d, not oneDNN, for batches under 16


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """F.conv3d, with oneDNN also for small float32 inputs on a CPU (measured up to 4 times as fast)."""
    b, c, t, h, _ = x.shape
    if (b * c * t * h <= SLOW_BELOW and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and type(x) is Tensor  # not a FakeTensor, which oneDNN cannot take
            and ONEDNN and not torch.compiler.is_compiling()):
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


@contextmanager
def tuned_convs(x: Tensor, state: StreamState) -> Iterator[None]:
    """Let cuDNN try its algorithms on each new shape (`cudnn.benchmark`) inside the block, for the later chunks of a
    stream on CUDA: their shape recurs. A first chunk's and a whole clip's may not, so there a trial would not pay."""
    if (not state or x.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling()
            or torch.are_deterministic_algorithms_enabled()):
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


WINOGRAD_CHANNELS = 256  # in and out, from which on `winograd_time_conv` saves more than its sums cost
WINOGRAD_PIXELS = 2**9  # of all pairs of frames, from which on it saves more than computing its kernels costs


def winograd_pays(padded: Tensor, out_channels: int) -> bool:
    b, c, t, h, w = padded.shape
    return (min(c, out_channels) >= WINOGRAD_CHANNELS and b * (t // 2 - 1) * h * w >= WINOGRAD_PIXELS
            and padded.device.type == "cpu" and padded.dtype == torch.float32 and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling())


def winograd_time_conv(padded: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> Tensor:
    """Convolve with three taps in time, computing two output frames by four 2D convs instead of six: Winograd's F(2, 3)
    in time (Lavin and Gray 2016, section 4.1), exact up to rounding. An odd frame is the first and is convolved
    directly, as a clip's first frame streams alone: so whole and streamed clips round alike.

    (B, C, T, H, W) -> (B, C', T - 2, H, W).
    """
    outputs = padded.shape[2] - 2
    odd_frame = outputs % 2
    first, second, third, fourth = (padded[:, :, odd_frame + i:odd_frame + outputs - 1 + i:2] for i in range(4))
    early, middle, late = weight.unbind(2)
    out = empty(padded, len(weight), outputs, *padded.shape[3:])
    even, odd = out[:, :, odd_frame::2], out[:, :, odd_frame + 1::2]

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
    if odd_frame:
        out[:, :, :1] = conv3d(padded[:, :, :3], weight, bias, (1, 1, 1), (0, *padding))
    return out


def empty(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised (B, *shape) with the batch, type and device of `like`, channels last."""
    return torch.empty(like.shape[0], *shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last_3d)


def add(x: Tensor, h: Tensor) -> Tensor:
    """x + h; reuses the memory of `h` if no gradient is needed."""
    return x + h if torch.is_grad_enabled() else h.add_(x)
