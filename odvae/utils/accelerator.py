"""Notice an accelerator that torch does not use."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("odvae")

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


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
