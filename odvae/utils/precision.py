"""Decide where to compute in half precision.

A CPU without instructions for bfloat16 or float16 emulates each product, which takes several times as long as float32.
This concerns computation only: files and caches may store half precision on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

logger = logging.getLogger("odvae")

HOOKS = ("_hf_hook", "_diffusers_hook")
HALF = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype, device: torch.device | str, what: str = "") -> torch.dtype:
    """Return `dtype`, or float32 instead of a half precision that `device` has no instructions for. `what` names the
    computation for a warning, logged once per process."""
    if dtype not in HALF or torch.device(device).type != "cpu" or cpu_supports(dtype):
        return dtype
    if what:
        _warn(what, dtype)
    return torch.float32


def compute_precision(precision: str, device: torch.device | str) -> str:
    """Return a mixed precision of accelerate ("no", "bf16"), or "no" if `device` has no instructions for it."""
    usable = precision != "bf16" or compute_dtype(torch.bfloat16, device, "bf16 training") is torch.bfloat16
    return precision if usable else "no"


def upcast_unsupported(parts: Iterable[nn.Module | None]) -> None:
    """Cast to float32, in place, modules on a CPU that has no instructions for their half precision.

    Modules with hooks of accelerate or diffusers are left alone: offloaded ones are on the CPU but run elsewhere.
    """
    for part in parts:
        tensor = None if part is None else next((p for p in part.parameters() if p.dtype in HALF), None)
        if part is None or tensor is None or any(hasattr(m, hook) for m in part.modules() for hook in HOOKS):
            continue
        if compute_dtype(tensor.dtype, tensor.device, type(part).__name__) is torch.float32:
            nn.Module.to(part, torch.float32)  # diffusers' own `to` warns about an empty list


@cache
def cpu_supports(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products in a half precision.

    oneDNN, which computes the products, reports what it supports on this CPU, and respects ONEDNN_MAX_CPU_ISA. For
    bfloat16 it accepts AVX-512, where it converts every value; so on x86 the CPU's own instructions are checked too.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    products = "AVX" not in torch.backends.cpu.get_cpu_capability() or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return products and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _warn(what: str, dtype: torch.dtype) -> None:
    logger.warning("%s: this CPU has no instructions for %s, using float32", what, str(dtype)[6:])
