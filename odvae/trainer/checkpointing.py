"""Activation checkpointing: which values the backward pass keeps from the forward pass, and which it computes again.

| mode | kept per block | computed again |
|---|---|---|
| none | all | nothing |
| attention | its input, and the results of attention over as many keys as queries | all other operations |
| full | its input | all |

Attention is most of the time of long videos and a small part of the memory, so "attention" costs little more time than
"none" and little more memory than "full".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..utils.errors import UserError

Checkpointing = Literal["none", "attention", "full"]
MODES: tuple[Checkpointing, ...] = ("none", "attention", "full")  # by memory, the most first


def enable_checkpointing(model: Any, mode: Checkpointing, *, compiled: bool = False) -> None:
    """Set the mode of a diffusers model, in place.

    Args:
        compiled: the model's blocks are compiled; with "attention" the compiler then decides within each block.

    Raises:
        UserError: the model does not support checkpointing.
    """
    if mode == "none":
        return
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise UserError(f"loop.gradient_checkpointing={mode}: {type(model).__name__} does not support it; use none")
    function = _recompute_all
    if mode == "attention":
        function = torch.compile(_recompute_cheap, fullgraph=True) if compiled else _recompute_cheap
    model.enable_gradient_checkpointing(function)


def _recompute_all(block: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False)


def _recompute_cheap(block: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    if not _is_attention(operation) or not _over_many_keys(args):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


@functools.cache
def _is_attention(operation: Any) -> bool:
    """Whether this is torch's attention by any kernel, FlexAttention, or an operator of a package as flash-attn."""
    name = str(operation)
    return "backward" not in name and any(part in name for part in ("attention", "flash_attn", "sage_attn"))


def _over_many_keys(args: tuple[Any, ...]) -> bool:
    """Whether there are as many keys as queries, unlike in attention to a short text, which is cheap."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return len(tensors) < 2 or tensors[1].numel() >= tensors[0].numel()


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a diffusers model that are alike (`_repeated_blocks`)."""
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]
