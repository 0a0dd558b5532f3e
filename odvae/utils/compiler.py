"""Whether torch.compile finds the compiler that it needs."""

from __future__ import annotations

import shutil

import torch

from .errors import UserError


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile's default backend lacks its compiler."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("torch.compile needs a C++ compiler on a CPU, and there is none: install g++, or do not "
                        "compile")
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise UserError("torch.compile needs Triton on this accelerator, and it is not installed: pip install triton, "
                        "or do not compile")
