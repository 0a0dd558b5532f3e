"""Choose the fused group norm of `norm_kernels` on CUDA in inference; without it, callers run the plain one.

Plain, the norm on CUDA copies channels last to contiguous, and SiLU copies it back: six passes over the values where
the kernel makes three, and it rounds once. Both agree to rounding.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_off: list[str] = []  # reasons not to use the kernel


def fused_group_norm(norm: nn.GroupNorm, x: Tensor, out: Tensor, *, per_frame: bool, silu: bool) -> bool:
    """Write the norm of `x`, or its SiLU, to `out`, both (B, C, T, H, W), if the kernel can. Returns whether it did."""
    if not is_usable(norm, x):
        return False
    try:
        _kernels().group_norm(x, out, norm.weight, norm.bias, norm.num_groups, norm.eps, per_frame=per_frame, silu=silu)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's compiler raises anything
        _off.append(str(error))
        logger.warning("the fused group norm cannot run here, using the plain one, which is slower: %s: %s",
                       type(error).__name__, str(error).partition("\n")[0])
        return False
    return True


def is_usable(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Whether to use the kernel: on CUDA, without gradients or autocast, outside torch.compile, which fuses by itself,
    and where Triton is there."""
    return (not torch.compiler.is_compiling() and x.device.type == "cuda" and x.dtype in DTYPES and not _off
            and type(x) is Tensor and not torch.is_grad_enabled()  # not a fake one or another subclass
            and not torch.is_autocast_enabled("cuda") and norm.weight.device == x.device and _kernels() is not None)


@contextmanager
def plain_norms() -> Iterator[None]:
    """Leave out the kernel inside the block, to compare."""
    _off.append("asked for")
    try:
        yield
    finally:
        _off.remove("asked for")


@cache
def _kernels() -> Any:
    """The kernels' module; None, after a warning, where there is no Triton."""
    try:
        return importlib.import_module(".norm_kernels", __package__)
    except Exception as error:  # Triton's import raises anything
        logger.warning("the fused group norm needs Triton, using the plain one, which is slower: %s", error)
        return None
