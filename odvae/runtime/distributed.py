"""Which process and which device this is. accelerate knows; this is where it is asked."""

from __future__ import annotations

import torch
from accelerate import PartialState


def is_main_process() -> bool:
    """True in the one process that writes files, also where there is only one."""
    return bool(PartialState().is_main_process)


def local_device() -> torch.device:
    """The accelerator that a launcher gave to this process, without asking for a process group."""
    import os

    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", rank % torch.cuda.device_count())


def best_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
