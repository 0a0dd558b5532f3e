"""Where half precision is computed in: the one place that decides.

A CPU without instructions for it emulates each product of bfloat16 or float16, which takes several times as long as
float32. Storing in half precision is another matter: files and caches may hold it on every machine.
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
    """`dtype`, or float32 in place of a half precision that `device` has no instructions for; `what` computes in it,
    for a warning in the log, once a process."""
    if dtype not in HALF or torch.device(device).type != "cpu" or cpu_computes_in(dtype):
        return dtype
    if what:
        _warn(what, dtype)
    return torch.float32


def compute_precision(precision: str, device: torch.device | str) -> str:
    """accelerate's name of a mixed precision ("no", "bf16"), or "no" where `device` has no instructions for it."""
    usable = precision != "bf16" or compute_dtype(torch.bfloat16, device, "bf16 training") is torch.bfloat16
    return precision if usable else "no"


def widen(parts: Iterable[nn.Module | None]) -> None:
    """Cast, in place, the modules to float32 that are in a half precision which the CPU they lie on cannot compute in.

    What hooks of accelerate or diffusers manage is left alone: offloaded, it lies on the CPU and works elsewhere.
    """
    for part in parts:
        tensor = None if part is None else next((p for p in part.parameters() if p.dtype in HALF), None)
        if part is None or tensor is None or any(hasattr(m, hook) for m in part.modules() for hook in HOOKS):
            continue
        if compute_dtype(tensor.dtype, tensor.device, type(part).__name__) is torch.float32:
            nn.Module.to(part, torch.float32)  # diffusers' own `to` warns of a list that is empty


@cache
def cpu_computes_in(dtype: torch.dtype) -> bool:
    """True where this CPU multiplies matrices of a half precision by instructions of its own.

    oneDNN, which does the products, says what it will do for the CPU, and heeds ONEDNN_MAX_CPU_ISA. For bfloat16 it is
    content with AVX-512, where it converts every value; so on x86 the CPU is asked for the products' instructions too.
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
    logger.warning("%s: this CPU has no instructions for %s; it computes in float32", what, str(dtype)[6:])
