"""RMSNorm with a backward pass that reads the values half as often on a CPU, where torch has no fused kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """The same as torch's, but faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, float(self.eps or 0))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension; `weight` may broadcast."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.requires_grad and not torch.compiler.is_compiling():
        unit: Tensor = _UnitRMS.apply(x, eps)
        return unit * weight
    if weight.ndim == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


class _UnitRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1) / -unit.shape[-1]
        return torch.addcmul(grad, along, unit).mul_(scale), None
