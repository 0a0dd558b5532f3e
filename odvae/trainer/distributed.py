"""Which process and which device this is, and what all processes say together. accelerate knows; here it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from torch import Tensor

PATIENCE = timedelta(hours=3)  # of the other processes, while the main one evaluates


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


def make_accelerator(**options: object) -> Accelerator:
    """accelerate's, for a training; `options` are its own."""
    # A batch need not use every parameter: windows from a clip's middle hold no first latent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(kwargs_handlers=[unused, InitProcessGroupKwargs(timeout=PATIENCE)], **options)


def leave() -> None:
    """Take leave of the other processes where there are any: gloo's threads abort a process that ends without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def totals(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """The sum of each value over all processes, the same in all of them; all must give the same names."""
    if accelerator.num_processes == 1:
        return dict(values)
    names = sorted(values)
    sums: Tensor = accelerator.reduce(torch.tensor([values[name] for name in names], dtype=torch.float64,
                                                   device=accelerator.device), "sum")
    return dict(zip(names, sums.tolist(), strict=True))
