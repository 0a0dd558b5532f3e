"""What a pipeline takes of memory, told before anything is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from odvae.memory import memory_estimate

if TYPE_CHECKING:
    from .pipeline import LVDMPipeline


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
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.weights.items())
        return (f"weights {_mib(sum(self.weights.values()))} ({parts}), history {_mib(self.history)}, decoding "
                f"{_mib(self.decoding)}; together {_mib(self.total)}, with --offload model {_mib(self.offloaded)}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def requirements(pipeline: LVDMPipeline, height: int, width: int, batch: int, frames: int) -> Requirements:
    """Of making `batch` videos of height x width pixels together, decoded `frames` frames at once."""
    weights = {name: sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
               for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    transformer, vae = pipeline.transformer, pipeline.vae
    config, space = transformer.config, vae.spatial_compression_ratio * transformer.config.patch_size
    latents = 1 + 2 * config.group_size
    tokens = latents * (height // space) * (width // space)
    history = 2 * batch * config.num_layers * 2 * tokens * config.hidden_size * transformer.dtype.itemsize
    decoding = memory_estimate(vae, "decode", height, width, frames=frames, batch=batch)
    return Requirements(weights, history, decoding)
