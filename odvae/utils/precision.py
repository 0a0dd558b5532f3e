"""Decide in which precision to compute: what was asked for, or what suits the device.

A CPU without instructions for bfloat16 or float16 emulates each product, which takes several times as long as float32.
This concerns computation only: files and caches may store half precision on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from .precision_names import Computed

logger = logging.getLogger("odvae")

HOOKS = ("_hf_hook", "_diffusers_hook")
HALF = (torch.bfloat16, torch.float16)


def resolve_precision(precision: str, device: torch.device | str, what: str = "the model") -> Computed:
    """Return what to compute in on a device: by "auto" bfloat16 on an accelerator that has it and float32 elsewhere,
    else what was asked for; but float32 where the device has no instructions for that, which is logged once."""
    device = torch.device(device)
    if precision == "auto":
        old = (device.type == "cuda" and torch.cuda.is_available()  # not so where a cluster's are meant
               and not torch.cuda.is_bf16_supported(including_emulation=False))
        return "float32" if device.type == "cpu" or old else "bfloat16"
    if precision == "tf32":
        return "tf32" if device.type == "cuda" else "float32"
    return "float32" if compute_dtype(dtype_of(precision), device, what) is torch.float32 else precision  # type: ignore


def dtype_of(precision: str) -> torch.dtype:
    """Return the type of weights and values in a precision, as `resolve_precision` returns it."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


def precision_of(model: Any) -> Computed:
    """Return the precision that a model on its device computes in now."""
    dtype: Computed = str(model.dtype).removeprefix("torch.")  # type: ignore[assignment]
    return "tf32" if dtype == "float32" and model.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else dtype


def set_precision(model: Any, precision: str) -> Computed:
    """Cast a model, on its device, to a precision ("auto" too), and allow TF32 in this process, or not. Returns the
    precision that it computes in. Take its fingerprint before: that of float32 weights."""
    resolved = use_precision(precision, next(model.parameters()).device, type(model).__name__)
    nn.Module.to(model, dtype_of(resolved))
    return resolved


def use_precision(precision: str, device: torch.device | str, what: str = "the model") -> Computed:
    """Resolve a precision, and allow TF32 in this process if that is it, or else not: torch by itself allows it to
    convolutions."""
    resolved = resolve_precision(precision, device, what)
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = resolved == "tf32"
    return resolved


def compute_dtype(dtype: torch.dtype, device: torch.device | str, what: str = "") -> torch.dtype:
    """Return `dtype`, or float32 instead of a half precision that `device` has no instructions for. `what` names the
    computation for a warning, logged once per process."""
    if dtype not in HALF or torch.device(device).type != "cpu" or cpu_supports(dtype):
        return dtype
    if what:
        _warn(what, dtype)
    return torch.float32


def compute_precision(precision: str, device: torch.device | str) -> str:
    """Return a mixed precision of accelerate ("no", "bf16"), or "no" if `device` has no instructions for it. "auto":
    "bf16" on an accelerator, "no" on a CPU."""
    if precision == "auto":
        return "bf16" if resolve_precision("auto", device) == "bfloat16" else "no"
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
