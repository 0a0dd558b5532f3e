"""Group norms, and norm, SiLU and causal padding before a conv as one step."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import CausalConv3d, StreamState, empty, fold, is_hooked, unfold
from .fused_norm import fused_group_norm, is_usable

NormKind = Literal["frame", "clip"]


class FrameNorm(nn.GroupNorm):
    """GroupNorm whose statistics are taken frame by frame, so that no frame can see a later one."""

    def forward(self, x: Tensor) -> Tensor:
        fused = _fused(self, x)
        return unfold(super().forward(fold(x)), len(x)) if fused is None else fused

    def scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, C, T, 1, 1) each, such that norm(x) = x * scale + shift.

        The statistics of a group are computed from the mean and variance of each of its channels. On a CPU with
        channels last this is three times as fast as aten's group norm, and as exact as a second pass over the values.
        """
        frames = [torch.batch_norm_update_stats(frame, None, None, 0.0) for frame in fold(x).split(1)]
        means, variances = (torch.stack(statistic).unflatten(1, (self.num_groups, -1))
                            for statistic in zip(*frames, strict=True))
        mean = means.mean(2, keepdim=True)
        variance = (variances + (means - mean).square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight.view(self.num_groups, -1)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        return unfold(scale.flatten(1)[..., None, None], len(x)), unfold(shift.flatten(1)[..., None, None], len(x))


class ClipNorm(nn.GroupNorm):
    """GroupNorm over time, height and width, as the public code has it in 3D blocks; not causal."""

    def forward(self, x: Tensor) -> Tensor:
        fused = _fused(self, x)  # with channels last aten sums naively: 20 times the rounding error
        return super().forward(x.contiguous()) if fused is None else fused


def _fused(norm: nn.GroupNorm, x: Tensor) -> Tensor | None:
    """The norm by the kernel on CUDA, channels last; None: it cannot."""
    if not is_usable(norm, x):
        return None
    out = empty(x, *x.shape[1:])
    return out if fused_group_norm(norm, x, out, per_frame=isinstance(norm, FrameNorm), silu=False) else None


def make_norm(kind: NormKind, groups: int, channels: int) -> nn.GroupNorm:
    return (FrameNorm if kind == "frame" else ClipNorm)(groups, channels, eps=1e-6)


LARGE_FRAME = 2**16  # values of a frame from which on `scale_and_shift` outweighs its call per frame
FRAME_BY_FRAME = 2**20  # values of a frame from which on other norms run frame by frame: memory then matters, not calls


def norm_silu_pad(norm: nn.GroupNorm, conv: CausalConv3d, x: Tensor,
                  state: StreamState) -> tuple[Tensor, StreamState]:
    """Return silu(norm(x)) padded for `conv.convolve`, and the next state.

    If no gradient is needed, the result is written straight into the padded tensor, so that neither it nor the padding
    in time costs a copy.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return conv.causal_pad(F.silu(norm(x)), state)
    time_padding = 0 if conv.is_first_frame(x, state) else conv.time_padding
    padded = empty(x, x.shape[1], x.shape[2] + time_padding, *x.shape[3:])
    out = padded[:, :, time_padding:] if time_padding else padded
    _norm_silu(norm, x, out)
    if time_padding:
        padded[:, :, :time_padding] = state if isinstance(state, Tensor) else out[:, :, :1]
    return padded, conv.next_state(padded, state)


def _norm_silu(norm: nn.GroupNorm, x: Tensor, out: Tensor) -> None:
    """Write silu(norm(x)) to `out`."""
    if not is_hooked(norm) and fused_group_norm(norm, x, out, per_frame=isinstance(norm, FrameNorm), silu=True):
        return
    values = x.shape[1] * x.shape[3] * x.shape[4]
    if (isinstance(norm, FrameNorm) and x.device.type == "cpu" and x.dtype == torch.float32 and values >= LARGE_FRAME
            and not is_hooked(norm)):
        scale, shift = norm.scale_and_shift(x)
        torch.addcmul(shift, x, scale, out=out)
        F.silu(out, inplace=True)
    else:
        frames = 1 if isinstance(norm, FrameNorm) and values >= FRAME_BY_FRAME else x.shape[2]
        for chunk, out_chunk in zip(x.split(frames, dim=2), out.split(frames, dim=2), strict=True):
            normed = norm(chunk)
            if normed.dtype == out_chunk.dtype:
                torch.ops.aten.silu.out(normed, out=out_chunk)
            else:  # autocast computes norms in float32
                out_chunk.copy_(F.silu(normed))
