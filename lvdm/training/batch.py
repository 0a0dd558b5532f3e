"""What a training step computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..condition import Condition
from .windows import Windows


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of windows with everything that is drawn at random for it."""

    windows: Windows
    noise: Tensor         # (B, c, T, h, w)
    t: Tensor             # (B, T) or (B,) timesteps
    condition: Condition  # of B samples

    @property
    def names(self) -> Sequence[str]:
        return self.windows.names

    @property
    def frames(self) -> int:
        return self.windows.frames


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch."""

    samples: int
    latents: tuple[int, int, int]  # (T, h, w)
    text_tokens: int

    def batch(self, config: Any, timesteps_per_sample: bool) -> TrainingBatch:
        """Return a batch of zeros for a transformer of this config, with one timestep per sample or per frame."""
        size, frames, text_dim = self.samples, self.latents[0], config.get("text_dim") or config.get("caption_channels")
        windows = Windows(torch.zeros(size, config.in_channels, *self.latents), ("",) * size, tuple(range(size)),
                          tuple(range(frames)), 8.0, ("",) * size)
        t = torch.zeros(size, dtype=torch.long) if timesteps_per_sample else torch.zeros(size, frames)
        condition = Condition(class_labels=torch.zeros(size, dtype=torch.long) if config.get("class_names") else None)
        if text_dim:
            mask = torch.ones(size, self.text_tokens, dtype=torch.bool)
            condition = Condition(torch.zeros(*mask.shape, text_dim), mask, condition.class_labels)
        return TrainingBatch(windows, torch.zeros_like(windows.latents), t, condition)
