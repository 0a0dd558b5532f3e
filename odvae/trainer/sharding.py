"""Sharding by torch's FSDP2: each process keeps a shard of every parameter, gradient, average and optimizer state.

A copy of the model is sharded and trained. The caller's model stays on the CPU and is filled from the shards, tensor by
tensor, when full weights are needed: in the main process for an evaluation, everywhere at the end. So objectives,
pipelines and files know nothing of shards, and only the process that needs it holds a full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..utils.errors import UserError
from .objective import Objective
from .optim import OptimizerConfig


def check_sharding(objective: Objective, settings: OptimizerConfig, critic: Objective | None) -> None:
    """Raise UserError for objectives and optimizers that do not support sharding."""
    if critic is not None or not objective.can_be_sharded:
        raise UserError(f"loop.sharding=full: {type(objective).__name__} needs full copies of its model; remove "
                        f"loop.sharding")
    if settings.name != "adamw":
        why = {"muon": "computes its steps from full matrices", "adamw8bit": "cannot shard its 8-bit state"}
        raise UserError(f"loop.sharding=full: the optimizer {settings.name} {why[settings.name]}; use adamw, or remove "
                        f"loop.sharding")


def shard(model: nn.Module, device: torch.device, processes: int, precision: str) -> None:
    """Shard, in place, the model's repeated blocks (diffusers' `_repeated_blocks`) one by one, then the rest.

    With bf16 parameters are gathered in bfloat16 and gradients averaged in float32. The policy does not cast inputs:
    autocast does what is needed, and a timestep keeps its precision.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None,
                                  reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (processes,))
    repeated = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in repeated]
    for module in (*reversed(blocks), model):  # from the inside out
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # As DDP's find_unused_parameters: processes need not use the same ones.
    model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the tensor that `tensor` is a shard of; return any other tensor unchanged. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather full tensors, those of shards on the CPU; return none unless `keep`. All processes must call it."""
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


def to_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor if `like` is a shard, else the tensor. Needs no communication."""
    if not isinstance(like, DTensor):
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
