"""Projections of the same input as one matrix product, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn


class FusableAttention(nn.Module, AttentionModuleMixin):
    """An attention layer with `to_q`, `to_k` and `to_v`, and diffusers' `fuse_projections` and `unfuse_projections`.

    Fused weights keep their names and modules: they lie one after another in memory, so that one product reads all of
    them. Where a layer is more than its weights (an adapter, a quantizer, a hook such as those of offloading), or a
    gradient is wanted, the layers are called one by one, fused or not.
    """

    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    is_cross_attention = False  # keys and values then have another input than queries

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of `x`, keys and values of `context` (None: of `x` too)."""
        context = x if context is None else context
        fused = self.project_fused(context)
        if fused is None:
            return self.to_q(x), self.to_k(context), self.to_v(context)
        if self.is_cross_attention:
            k, v = fused.chunk(2, dim=-1)
            return self.to_q(x), k, v
        q, k, v = fused.chunk(3, dim=-1)
        return q, k, v

    def project_fused(self, context: Tensor) -> Tensor | None:
        """All of `joint_layers` at once, one after another in the last dimension; None if they cannot be fused."""
        if not self.fused_projections or torch.compiler.is_compiling():
            return None
        joint = _joint(self.joint_layers())
        return None if joint is None else F.linear(context, *joint)

    def fuse_projections(self) -> None:
        """Compute projections of one input at once, for inference."""
        self.fused_projections = True
        _join(self.joint_layers())

    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`."""
        self.fused_projections = False

    def joint_layers(self) -> list[nn.Linear]:
        """Return the projections that have one input."""
        layers: Any = self._modules  # directly, as getattr is slow
        if self.is_cross_attention:
            return [layers["to_k"], layers["to_v"]]
        return [layers["to_q"], layers["to_k"], layers["to_v"]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the weights, which separates them."""
        super()._apply(fn, recurse)
        if self.fused_projections:
            _join(self.joint_layers())
        return self


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer computes what its weights say, and no more: it has no adapter, quantizer or hook. Hooks of
    accelerate and diffusers replace a module's `forward`."""
    state = layer.__dict__
    return (type(layer) is kind and type(state["_parameters"]["weight"]) is nn.Parameter and "forward" not in state
            and not state["_forward_hooks"] and not state["_forward_pre_hooks"])


def _joint(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
    """The weights and biases of all layers as one, where they lie one after another; else None."""
    if not all(map(is_plain, layers)):
        return None
    weights, biases = ([layer._parameters[name] for layer in layers] for name in ("weight", "bias"))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*weights, *biases)):
        return None
    weight = _concatenated(weights)
    if weight is None or biases[0] is None:
        return None if weight is None else (weight, None)
    bias = _concatenated(biases)
    return None if bias is None else (weight, bias)


def _concatenated(parts: list[Any]) -> Tensor | None:
    """A view of all parts, along their first dimension; None if they are not neighbours in one storage."""
    first, rows = parts[0], 0
    start = end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.nbytes
        rows += part.shape[0]
    storage = first.untyped_storage()
    if storage.data_ptr() + storage.nbytes() < end or start == 0:  # neighbours by chance; 0: no memory
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def _join(layers: list[nn.Linear]) -> None:
    """Move the weights of plain layers next to each other, once."""
    if not all(map(is_plain, layers)):
        return
    for name in ("weight", "bias"):
        parts: list[Any] = [layer._parameters[name] for layer in layers]
        first = parts[0]
        if first is None or len({part.dtype for part in parts}) > 1 or _concatenated(parts) is not None:
            continue
        with torch.inference_mode(first.is_inference()):  # an inference tensor could not be trained
            for part, data in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                part.data = data
