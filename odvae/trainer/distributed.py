"""Processes and devices, by accelerate.

The collectives of a step run in accelerate's process group and fail after `TIMEOUT`. Where processes wait for one that
does something long (an evaluation, a file), they wait in a group of their own, `patient_group`, which a dead process
ends at once and nothing else before `PATIENCE`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

from ..utils.devices import accelerator_type, warn_if_driver_too_old
from ..utils.errors import UserError

TIMEOUT = timedelta(minutes=30)  # of a step's collectives
PATIENCE = timedelta(days=7)

T = TypeVar("T")
_patient: dict[int, Any] = {}  # the patient group, by the ID of the group of all processes


def start_processes() -> PartialState:
    """Join the processes that the launcher started, if it started several; without effect the second time."""
    timeout = {"timeout": TIMEOUT} if not PartialState._shared_state else {}
    return PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), **timeout)


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return bool(start_processes().is_main_process)


def process_index() -> int:
    return int(start_processes().process_index)


def num_processes() -> int:
    return int(start_processes().num_processes)


def patient_group() -> Any:
    """Return the group to wait in, on the CPU by gloo; None with one process. All processes must call it the first
    time."""
    if start_processes().num_processes == 1:
        return None
    world = id(distributed.group.WORLD)
    if world not in _patient:
        _patient.clear()
        _patient[world] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[world]


def wait_for_all() -> None:
    """Wait until all processes are here, however long the slowest takes."""
    if (group := patient_group()) is not None:
        distributed.barrier(group=group)


def gather(value: T) -> list[T]:
    """Return the value of each process, in every process, however long the slowest takes."""
    if (group := patient_group()) is None:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def from_main_process(compute: Callable[[], T]) -> T:
    """Return what `compute` returns in the main process, in every process; a UserError of it is raised in all."""
    result: T | UserError | None = None
    if is_main_process():
        try:
            result = compute()
        except UserError as error:
            result = error
    first: Any = gather(result)[0]
    if isinstance(first, UserError):
        raise first
    return first


def any_process(mine: bool) -> bool:
    """Return whether `mine` is true in any process, however long the slowest takes."""
    if (group := patient_group()) is None:
        return mine
    vote = torch.tensor(mine, dtype=torch.uint8)
    distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=group)
    return bool(vote)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others, which find on disk what it has written."""
    main = is_main_process()
    if not main:
        wait_for_all()
    yield
    if main:
        wait_for_all()


def local_device() -> torch.device:
    """Return the accelerator that the launcher assigned to this process, without creating a process group."""
    if (device := best_device()).type != "cuda":
        return device
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", rank % torch.cuda.device_count())


def best_device() -> torch.device:
    """Return this process's current accelerator if there is one, else the CPU: the device that trainings use too."""
    warn_if_driver_too_old()
    return torch.device("cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator_type() or "cpu")


@contextlib.contextmanager
def module_on_accelerator(module: nn.Module) -> Iterator[None]:
    """Keep a module on the accelerator, where there is one, inside the block, and afterwards where it was before."""
    before = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    nn.Module.to(module, best_device())  # diffusers' own `to` warns about an empty list
    try:
        yield
    finally:
        nn.Module.to(module, before)


def make_accelerator(*, every_parameter: bool = False, **options: object) -> Accelerator:
    """Create an Accelerator for training; `options` are its arguments.

    Args:
        every_parameter: every batch uses every parameter; if not, each backward pass searches those that it does not.
    """
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not every_parameter, gradient_as_bucket_view=True)
    return Accelerator(kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=TIMEOUT)], **options)


def shutdown() -> None:
    """Destroy the process group if there is one: gloo's threads abort a process that exits without this."""
    _patient.clear()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def reduce_step(accelerator: Accelerator, on_device: Mapping[str, Tensor],
                on_host: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scalars of this process, and their sums over all; all must pass the same names.

    This is the one place where a training step waits for the device.
    """
    device = accelerator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # holds every float32
    names = [*on_device, *on_host]
    values = torch.stack([value.to(device, dtype, non_blocking=True) for value in on_device.values()])
    if accelerator.num_processes == 1:
        mine = dict(zip(names, [*values.tolist(), *on_host.values()], strict=True))
        return mine, mine
    host = torch.tensor(list(on_host.values()), dtype=dtype).to(device, non_blocking=True)
    values = torch.cat([values, host])
    both = torch.stack([values, accelerator.reduce(values.clone(), "sum")]).tolist()
    return dict(zip(names, both[0], strict=True)), dict(zip(names, both[1], strict=True))
