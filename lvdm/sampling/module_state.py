"""What determines a network's output besides its weights and its config."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

NEUTRAL_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def module_state(model: nn.Module) -> dict[str, Any]:
    """Return, as plain values, which adapters are active or merged and their scaling, which attention kernels are set,
    and which of diffusers' hooks change what a module computes (such as layerwise casting and caches). Empty for a
    network as loaded.
    """
    modules = dict(model.named_modules())
    state: dict[str, dict[str, Any]] = {}
    for kind, read in (("adapters", _adapters), ("attention", _attention), ("hooks", _hooks)):
        by_module = {name: value for name, module in modules.items() if (value := read(module))}
        if by_module:
            state[kind] = by_module
    return state


def _adapters(module: nn.Module) -> dict[str, Any]:
    if "peft" not in sys.modules:  # an optional package; without it there are no adapters
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return {}
    scaling = {name: float(value) for name, value in getattr(module, "scaling", {}).items()}
    return {"active": list(module.active_adapters), "disabled": bool(module.disable_adapters),
            "merged": list(module.merged_adapters), "scaling": scaling}


def _attention(module: nn.Module) -> str:
    backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
    return "" if backend is None else str(getattr(backend, "value", backend))


def _hooks(module: nn.Module) -> dict[str, dict[str, str]]:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return {name: {key: str(value) for key, value in vars(hook).items() if isinstance(value, int | float | torch.dtype)}
            for name, hook in hooks.items() if name not in NEUTRAL_HOOKS}
