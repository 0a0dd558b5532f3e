"""What differs between accelerators, CUDA's and Apple's (MPS): which there is, waiting for it, its memory."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("odvae")

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def accelerator_type() -> str | None:
    """Return the type of this machine's accelerator, as accelerate chooses it; None: there is none."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def _module(device: torch.device | str | None = None) -> Any:
    """Return torch's module for a device's type, by default the accelerator's; None for a CPU."""
    kind = accelerator_type() if device is None else torch.device(device).type
    return getattr(torch, kind) if kind in ("cuda", "mps") else None


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait until a device, by default the accelerator, has done all that was asked of it: times are true only then."""
    if (module := _module(device)) is not None:
        module.synchronize()


def empty_cache() -> None:
    """Return what torch's allocator holds unused on the accelerator, if there is one."""
    if (module := _module()) is not None:
        module.empty_cache()


def free_accelerator_memory(device: torch.device, available: int) -> int:
    """Return the bytes that tensors can still take on an accelerator: also those that torch's allocator holds unused,
    which it uses before it asks for more. `available`: of the machine's memory, which Apple's accelerator shares."""
    if device.type == "mps":
        used, limit = torch.mps.current_allocated_memory(), torch.mps.recommended_max_memory()
        return max(0, min(limit - used, available + torch.mps.driver_allocated_memory() - used))
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)


@cache
def warn_if_driver_too_old() -> None:
    """Warn, once, if torch is built for CUDA and this machine has NVIDIA's driver, but CUDA cannot be used: torch falls
    back to the CPU without a word."""
    if torch.version.cuda is None or torch.cuda.is_available() or not NVIDIA_DRIVER.exists():
        return
    lines = NVIDIA_DRIVER.read_text(errors="replace").splitlines()
    logger.warning("THE GPU IS NOT USED, everything runs on the CPU: torch is built for CUDA %s, which this machine's "
                   "driver does not support, or CUDA_VISIBLE_DEVICES hides the GPU (%s). Update the driver, or install "
                   "a torch for an older CUDA, see https://pytorch.org/get-started/previous-versions",
                   torch.version.cuda, lines[0].strip() if lines else "driver unknown")
