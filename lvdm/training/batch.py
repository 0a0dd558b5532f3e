"""What a training step computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..condition import Condition
from .windows import Windows


@dataclass(frozen=True)
class OwnHistoryDraws:
    """What a model's own history is drawn from, see `self_rollout`."""

    replaced: Tensor  # (B,) bool: the samples whose history it replaces
    samples: tuple[int, ...]  # those it is computed for: at least one, so that every process makes the same calls
    start: Tensor     # (B,) levels that the true history is noised to
    noise: Tensor     # (B, c, T, h, w)


@dataclass(frozen=True)
class HistoryDraws:
    """The history that groups are predicted from in the regime "teacher", see `history`."""

    forced: Tensor  # (B,) bool: the samples of this regime; in the others groups see what is noised
    noise: Tensor   # (B, c, T, h, w) of the history
    t: Tensor       # (B, T) its levels
    own: OwnHistoryDraws | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of windows with everything that is drawn at random for it."""

    windows: Windows
    noise: Tensor         # (B, c, T, h, w)
    t: Tensor             # (B, T) or (B,) timesteps
    condition: Condition  # of B samples
    noised: Tensor | None = field(default=None, kw_only=True)  # (B, T) bool: the frames to predict; None: those above
    #                                                            `flow.history_noise`
    history: HistoryDraws | None = field(default=None, kw_only=True)  # None: groups see what is noised

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
