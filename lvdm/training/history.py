"""Teacher forcing: every group is predicted from a clean, or lightly noised, copy of the earlier groups, as in a step
of a rollout, while diffusion forcing predicts it from the groups as they are noised (2407.01392). All groups of a
window are trained at once.

A window's tokens pass through the transformer twice: as history, whose keys and values are kept, and noised, each group
on the keys and values of those before it. That is what one pass over both copies with a mask computes, without the
mask: for any attention kernel, and with the code path of a rollout's cache. The history's tokens are what it takes more
than diffusion forcing. Gradients go through both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from odvae.utils.config import Config

from ..model.groups import group_sizes
from ..model.transformer import History


class CorruptionConfig(Config):
    """A strongly corrupted history, the cheap way to train for a rollout's errors; see `flow.corrupted_levels`. The
    timestep says how strongly."""

    share: float = Field(0.9, ge=0, le=1)  # of the frames
    noise: float = Field(1 / 3, gt=0, lt=1)  # highest level


@dataclass(frozen=True)
class ForcedHistory:
    """What groups see of the groups before them."""

    latents: Tensor  # (B, c, T, h, w), noised
    t: Tensor        # (B, T) its levels
    forced: Tensor   # (B,) bool; where False, they see what is being predicted: diffusion forcing

    def select(self, rows: Tensor) -> ForcedHistory:
        """Select samples."""
        return ForcedHistory(self.latents[rows], self.t[rows], self.forced[rows])

    def repeat(self, times: int) -> ForcedHistory:
        """Repeat the batch."""
        return ForcedHistory(self.latents.repeat(times, 1, 1, 1, 1), self.t.repeat(times, 1), self.forced.repeat(times))


def group_slices(frames: int, group_size: int) -> Iterator[slice]:
    """The latent frames of each group of a window."""
    start = 0
    for size in group_sizes(frames, group_size):
        yield slice(start, start + size)
        start += size


def predict_by_group(model: Any, x: Tensor, t: Tensor, history: ForcedHistory, *, positions: Sequence[int],
                     target_timestep: Tensor | None = None, **options: Any) -> Tensor:
    """Predict every group of x (B, c, T, h, w) at the levels t (B, T) from `history`, of which it sees what is before
    it. Where nothing is forced, the result is that of one pass over x.

    Args:
        positions: of the T latents in time.
        target_timestep: (B, T), of a flow map. A forced history goes nowhere.
        options: further arguments of the model.
    """
    slices = list(group_slices(x.shape[2], model.config.group_size))
    before = slices[-1].start  # frames that are history to some group
    seen = torch.where(history.forced[:, None, None, None, None], history.latents.to(x.dtype), x)
    seen_t = torch.where(history.forced[:, None], history.t, t)
    seen_r = None if target_timestep is None else torch.where(history.forced[:, None], history.t, target_timestep)

    def evaluate(latents: Tensor, level: Tensor, target: Tensor | None, part: slice, **more: Any) -> Any:
        toward = {} if target is None else {"target_timestep": target[:, part]}
        return model(latents[:, :, part], level[:, part], positions=positions[part], **toward, **options, **more)

    keys: History | None = None
    if before:
        sizes = [part.stop - part.start for part in slices[:-1]]
        keys = evaluate(seen, seen_t, seen_r, slice(before), groups=sizes, return_history=True).history
    predicted = [evaluate(x, t, target_timestep, part, groups=(part.stop - part.start,),
                          history=first_frames(keys, part.start, before)).sample for part in slices]
    return torch.cat(predicted, dim=2)


def first_frames(history: History | None, frames: int, of: int) -> History | None:
    """The keys and values of the first `frames` latent frames of a history of `of` frames."""
    if history is None or not frames:
        return None
    tokens = history[0][0].shape[1] // of * frames
    return tuple((keys[:, :tokens], values[:, :tokens]) for keys, values in history)
