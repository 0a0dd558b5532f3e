"""Sharding by torch's FSDP2: each process keeps a shard of every parameter, gradient, average and optimizer state.

A copy of the model is sharded, trained and evaluated. The caller's model stays on the CPU and is filled from the shards
at the end. So files know nothing of shards, and no device ever holds a full model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..utils.errors import UserError
from .config import LoopConfig
from .distributed import any_process
from .objective import Objective


def check_sharding(objective: Objective, loop: LoopConfig, critic: Objective | None) -> None:
    """Raise UserError for objectives and optimizers that do not support sharding."""
    if loop.sharding == "none":
        return
    if critic is not None or not objective.can_be_sharded:
        raise UserError(f"loop.sharding={loop.sharding}: {type(objective).__name__} needs full copies of its model; "
                        f"remove loop.sharding")
    name = (objective.optimizer or loop.optimizer).name
    if name != "adamw":
        why = {"muon": "computes its steps from full matrices", "adamw8bit": "cannot shard its 8-bit state"}
        raise UserError(f"loop.sharding={loop.sharding}: the optimizer {name} {why[name]}; use adamw, or remove "
                        f"loop.sharding")


def copy_size(loop: LoopConfig, processes: int) -> int:
    """Return the number of processes that share a copy of the model."""
    if loop.sharding == "none":
        return 1
    host = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return processes if loop.sharding == "full" else loop.shard_size or host


def make_mesh(loop: LoopConfig, device: torch.device, processes: int) -> DeviceMesh:
    """Return the mesh over whose last dimension tensors are sharded. Over the first of two, copies are kept.

    Raises:
        UserError: the processes are no multiple of those that share a copy.
    """
    if loop.sharding == "full":
        return init_device_mesh(device.type, (processes,))
    size = copy_size(loop, processes)
    if processes % size:
        raise UserError(f"loop.sharding=hybrid: {processes} processes cannot be divided into groups of {size} that "
                        f"share a copy of the model; set loop.shard_size to a divisor of {processes}")
    return init_device_mesh(device.type, (processes // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Shard, in place, the model's repeated blocks (diffusers' `_repeated_blocks`) one by one, then the rest.

    With bf16 parameters are gathered in bfloat16 and gradients averaged in float32. The policy does not cast inputs:
    autocast does what is needed, and a timestep keeps its precision. It is part of the model's forward pass, so that an
    evaluation may call it as it calls a whole model.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    repeated = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    if precision == "bf16":
        autocast = torch.autocast(mesh.device_type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))  # type: ignore[method-assign]
    for module in (*reversed(blocks), model):  # from the inside out
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # As DDP's find_unused_parameters: processes need not use the same ones.
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


class JoinedForward:
    """Lets processes call a sharded model as often as each needs to, in an evaluation.

    A forward pass gathers parameters from all processes. So before each one, all vote whether any makes one; those that
    have finished take part in gathering only, in `join`, until all have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._parts: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block every forward pass starts by a vote and keeps no gathered parameters."""
        self.model._get_fsdp_state()._lazy_init()  # else done by the first forward pass, which may never come here
        self.model.reshard()
        self.model.set_reshard_after_forward(True, recurse=False)
        hook = self.model.register_forward_pre_hook(_announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
            self.model.set_reshard_after_forward(False, recurse=False)

    def join(self) -> None:
        """Take part in the forward passes of the others until all processes are here."""
        while any_process(False):
            for part in self._parts:  # in the order of a forward pass
                part.unshard()
                part.reshard()


def _announce(*_: Any) -> None:
    any_process(True)


def swap(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Exchange the values of two lists of tensors, or of shards, in place: exact, and without a copy of all."""
    with torch.no_grad():
        for a, b in zip(map(local, tensors), map(local, others), strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the tensor that `tensor` is a shard of; return any other tensor unchanged. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor if `like` is a shard, else, or if it is one already, the tensor.
    Needs no communication."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full
    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace full tensors in a saved state dict by shards, if the optimizer's parameters are shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in state["state"].items():
        like = parameters[number]
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == like.shape:
                entry[name] = to_shard(value, like)
