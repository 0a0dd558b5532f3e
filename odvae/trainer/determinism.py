"""Kernels whose results do not depend on the order in which threads finish."""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def use_deterministic_algorithms() -> None:
    """Use deterministic kernels from now on, in this process. An operation without one raises RuntimeError.

    cuBLAS reads its variable when it is first used: call this before anything is computed.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
