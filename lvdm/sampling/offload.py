"""How much memory a pipeline needs, estimated beforehand, and how its weights leave the accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, remove_hook_from_module
from torch import nn

from odvae.inference.memory import memory_estimate
from odvae.utils.format import format_bytes

from ..defaults import HISTORY_GROUPS

if TYPE_CHECKING:
    from ..model.transformer import LVDMTransformer3DModel


@dataclass(frozen=True)
class Requirements:
    """Bytes. At work at the same time are all weights (with offload: the largest part) and the larger of the others."""

    weights: dict[str, int]  # by part
    history: int             # keys and values of what a group looks back on, with guidance
    decoding: int            # peak of the VAE's decoder, beside its weights

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.history + self.decoding

    @property
    def offloaded(self) -> int:
        """On the accelerator with model offload, where parts take turns."""
        vae = self.weights["vae"]  # stays beside the transformer, once it has decoded a group
        return max(vae + self.weights["transformer"] + self.history, vae + self.decoding, *self.weights.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.weights.items())
        all_weights, history, decoding, total, offloaded = map(format_bytes, (
            sum(self.weights.values()), self.history, self.decoding, self.total, self.offloaded))
        return (f"weights {all_weights} ({parts}), history {history}, decoding {decoding}; together {total}, with "
                f"--offload model {offloaded}")


def requirements(components: Mapping[str, Any], height: int, width: int, batch: int, frames: int) -> Requirements:
    """Of making `batch` videos of height x width pixels together, decoded `frames` frames at once, with a pipeline of
    these components."""
    weights = {name: sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
               for name, part in components.items() if isinstance(part, nn.Module)}
    transformer, vae = components["transformer"], components["vae"]
    config, space = transformer.config, vae.spatial_compression_ratio * transformer.config.patch_size
    latents = 1 + HISTORY_GROUPS * config.group_size
    tokens = latents * (height // space) * (width // space)
    history = 2 * batch * config.num_layers * 2 * tokens * config.hidden_size * transformer.dtype.itemsize
    decoding = memory_estimate(vae, "decode", height, width, frames=frames, batch=batch)
    return Requirements(weights, history, decoding)


def offload_blocks(transformer: LVDMTransformer3DModel, device: torch.device) -> None:
    """Keep the weights in the CPU's memory and bring a block to the device only while it works."""
    remove_hook_from_module(transformer, recurse=True)
    cpu_offload(transformer, device, offload_buffers=True, preload_module_classes=transformer._no_split_modules)


def onload(part: nn.Module) -> None:
    """With model offload, bring a part to the accelerator whose work does not go through `forward`, which does that."""
    hook = getattr(part, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.pre_forward(part)
