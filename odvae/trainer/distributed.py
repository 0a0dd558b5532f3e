"""Processes and devices, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from torch import Tensor

TIMEOUT = timedelta(hours=3)  # how long the other processes wait while the main one evaluates


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return bool(PartialState().is_main_process)


def local_device() -> torch.device:
    """Return the accelerator that the launcher assigned to this process, without creating a process group."""
    import os

    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", rank % torch.cuda.device_count())


def best_device() -> torch.device:
    """Return this process's current accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_accelerator(**options: object) -> Accelerator:
    """Create an Accelerator for training; `options` are its arguments."""
    # A batch need not use every parameter: windows from the middle of a clip contain no first latent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=TIMEOUT)], **options)


def shutdown() -> None:
    """Destroy the process group if there is one: gloo's threads abort a process that exits without this."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_sum(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of each value over all processes; all must pass the same names."""
    if accelerator.num_processes == 1:
        return dict(values)
    names = sorted(values)
    sums: Tensor = accelerator.reduce(torch.tensor([values[name] for name in names], dtype=torch.float64,
                                                   device=accelerator.device), "sum")
    return dict(zip(names, sums.tolist(), strict=True))
