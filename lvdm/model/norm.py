"""Norms whose input and output have the compute dtype, also under autocast, while they compute in float32.

Autocast would return float32 from a norm, and with it a residual stream of twice the size. RMSNorm has a backward pass
that reads the values half as often on a CPU, where torch has no fused kernel.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CPU = (torch.float32, torch.bfloat16, torch.float16)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast for the device of `x`, if it is enabled."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimension, in the dtype of `x`."""
    with without_autocast(x):
        return F.layer_norm(x, x.shape[-1:], eps=eps)


class LayerNorm(nn.LayerNorm):
    """torch's, without weights, in the dtype of its input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's, but faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, float(self.eps or 0))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of `x`; the mean over the last dimension; `weight` may
    broadcast."""
    weight = weight.to(x.dtype)
    with without_autocast(x):
        if x.device.type == "cpu" and x.dtype in _CPU and x.requires_grad and not torch.compiler.is_compiling():
            unit: Tensor = _UnitRMS.apply(x, eps)
            return unit * weight
        if weight.ndim == 1:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


class _UnitRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        exact = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(exact, exact).unsqueeze(-1) / x.shape[-1] + eps)
        unit = (exact * scale).to(x.dtype)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        exact, direction = grad.float(), unit.float()
        along = torch.linalg.vecdot(exact, direction).unsqueeze(-1) / -unit.shape[-1]
        return torch.addcmul(exact, along, direction).mul_(scale).to(unit.dtype), None
