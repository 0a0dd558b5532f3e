"""Sharding by torch's FSDP2: each process keeps a part of every parameter, gradient, average and optimizer state.

What is sharded and trained is a copy. The caller's model stays what it is, on the CPU, and is filled from the shards,
tensor by tensor, where whole weights are wanted: in the main process for an evaluation, everywhere at the end. So
objectives, pipelines and files know nothing of shards, and no process but the one that needs it holds a whole model.
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
    """Raise UserError for what cannot be trained in shards."""
    if critic is not None or not objective.can_be_sharded:
        raise UserError(f"loop.sharding=full: {type(objective).__name__} is trained on whole copies of its model; "
                        f"leave loop.sharding out")
    if settings.name != "adamw":
        why = {"muon": "makes its steps from whole matrices", "adamw8bit": "has no 8-bit state in shards"}
        raise UserError(f"loop.sharding=full: the optimizer {settings.name} {why[settings.name]}; take adamw, or leave "
                        f"loop.sharding out")


def shard(model: nn.Module, device: torch.device, processes: int, precision: str) -> None:
    """Shard, in place, the model's repeated blocks (diffusers' `_repeated_blocks`) one by one, then what is left.

    With bf16 parameters are gathered in bfloat16 and gradients are averaged in float32. Inputs are not cast by the
    policy: autocast does what is needed, and a timestep keeps its digits.
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


def whole(tensor: Tensor) -> Tensor:
    """The tensor that `tensor` is a shard of, or itself. Of a shard all processes must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors, shards' on the CPU; nothing where not `keep`. All processes must ask at once."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            kept[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return kept


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this process keeps of it: a shard where `like` is one. No other process is asked."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put the shards of whole tensors into a state dict that was saved, where the optimizer's parameters are shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in state["state"].items():
        like = parameters[number]
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == like.shape:
                entry[name] = part_of(value, like)
