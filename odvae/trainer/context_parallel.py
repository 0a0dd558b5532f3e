"""Context parallelism by diffusers' hooks: consecutive processes share the tokens of each sample."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from ..utils.errors import UserError
from .config import LoopConfig
from .objective import Objective


def check_context_parallel(objective: Objective, loop: LoopConfig, critic: Objective | None, processes: int) -> None:
    """Raise UserError for models and numbers of processes that do not support it."""
    if loop.context_parallel == 1:
        return
    if critic is not None or not getattr(objective.model, "_cp_plan", None):
        raise UserError(f"loop.context_parallel={loop.context_parallel}: the tokens of a "
                        f"{type(objective.model).__name__} cannot be shared; remove it")
    heads = getattr(getattr(objective.model, "config", None), "num_attention_heads", 0)
    for number, name in ((processes, "processes"), (heads, "attention heads")):
        if number % loop.context_parallel:
            raise UserError(f"loop.context_parallel={loop.context_parallel} does not divide the {number} {name}; "
                            f"choose a divisor of it")


def enable_context_parallel(model: Any, device: torch.device, together: int) -> None:
    """What diffusers' `enable_parallelism` does, which takes no CPU. The loss must be the same in the processes that
    share a sample, and the gradient of each is the part that its tokens contribute."""
    processes = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (processes // together, 1, together),
                            mesh_dim_names=("replicate", "ring", "ulysses"))
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=together, mesh=mesh))
    config.setup(distributed.get_rank(), processes, device, mesh=mesh)
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)
    _set_config(model, config)


def disable_context_parallel(model: Any) -> None:
    """Undo `enable_context_parallel`, if it was called."""
    if getattr(model, "_parallel_config", None) is not None:
        remove_context_parallel(model, model._cp_plan)
        _set_config(model, None)


def _set_config(model: Any, config: ParallelConfig | None) -> None:
    model._parallel_config = config
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
