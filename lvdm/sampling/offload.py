"""Estimated memory requirements of a pipeline, and offloading of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import CpuOffload
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from torch import nn

from odvae.inference.memory import memory_estimate
from odvae.utils.format import format_bytes

from ..defaults import HISTORY_GROUPS


@dataclass(frozen=True)
class Requirements:
    """Bytes."""

    weights: dict[str, int]  # by component
    history: int             # keys and values of the history that a group attends to, with guidance
    decoding: int            # peak of the VAE's decoder, besides its weights

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.history + self.decoding

    @property
    def offloaded(self) -> int:
        """On the accelerator with model offload, where components take turns."""
        vae = self.weights["vae"]  # stays beside the transformer, once it has decoded a group
        return max(vae + self.weights["transformer"] + self.history, vae + self.decoding, *self.weights.values())

    def __str__(self) -> str:
        components = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.weights.items())
        all_weights, history, decoding, total, offloaded = map(format_bytes, (
            sum(self.weights.values()), self.history, self.decoding, self.total, self.offloaded))
        return (f"weights {all_weights} ({components}), history {history}, decoding {decoding}; total {total}, with "
                f"--offload model {offloaded}")


def requirements(components: Mapping[str, Any], height: int, width: int, batch: int, frames: int) -> Requirements:
    """Estimate the memory for a batch of videos of height x width pixels, decoded `frames` frames at once, with a
    pipeline of these components."""
    weights = component_bytes(components)
    transformer, vae = components["transformer"], components["vae"]
    config, pixels = transformer.config, vae.spatial_compression_ratio * transformer.config.patch_size  # a token's side
    latents = 1 + HISTORY_GROUPS * config.group_size
    tokens = latents * (height // pixels) * (width // pixels)
    history = 2 * batch * config.num_layers * 2 * tokens * config.hidden_size * transformer.dtype.itemsize
    decoding = memory_estimate(vae, "decode", height, width, frames=frames, batch=batch)
    return Requirements(weights, history, decoding)


def component_bytes(components: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the weights by component."""
    return {name: sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
            for name, module in components.items() if isinstance(module, nn.Module)}


def onload(module: nn.Module) -> None:
    """With model offload, bring a component to the accelerator when it is not called through `forward`, which does
    that."""
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.pre_forward(module)


def has_tied_weights(module: nn.Module) -> bool:
    """Return whether two of its layers share a weight."""
    return len(list(module.named_parameters(remove_duplicate=False))) > len(list(module.parameters()))


def is_offloaded(module: nn.Module) -> bool:
    """Return whether one of the offloads of diffusers moves its weights."""
    return hasattr(module, "_hf_hook") or _get_top_level_group_offload_hook(module) is not None
