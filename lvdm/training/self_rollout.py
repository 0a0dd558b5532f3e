"""Self-rollout: a history that the model made itself, so that it learns to go on from its own errors; no teacher.

Resampling Forcing (2512.15702): the true history is noised to a level at which its content is kept, and denoised by the
model, group by group, each on those it made before; the loss is that of teacher forcing on the next true group, and no
gradient goes through the history. So errors add up as in a rollout, while the target stays the data. (BAgger,
2512.12080, likewise trains by the plain flow loss on pairs from the model's own drifted history back to the data.)

The weights are those being trained, not their average: they are at hand in every process, sharded or not, and are what
a checkpoint restores. Levels and noise come with the batch, so that a step is a pure function of the seed, the step and
the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from odvae.utils.config import Config

from ..flow import interpolate, per_frame
from .batch import OwnHistoryDraws
from .history import group_slices


class SelfRolloutConfig(Config):
    share: float = Field(0.5, gt=0, le=1)  # of the samples of the regime "teacher" whose history is the model's own
    after: int = Field(0, ge=0)  # steps that are trained on the true history before: at first the model's is nothing
    start: tuple[float, float] = (0.2, 0.8)  # range of the levels that the true history is noised to, drawn uniformly;
    #                                          the higher, the more of the history is the model's
    steps: int = Field(2, ge=1)  # of Euler, from there to 0; of a flow map one is enough

    @model_validator(mode="after")
    def _check_range(self) -> SelfRolloutConfig:
        if not 0 < self.start[0] <= self.start[1] <= 1:
            raise ValueError(f"start={list(self.start)} must be [lowest, highest] in (0, 1]")
        return self


def draw_own_history(config: SelfRolloutConfig, forced: Tensor, noise: Tensor,
                     rngs: Sequence[torch.Generator]) -> OwnHistoryDraws:
    """Draw which of the `forced` (B,) samples get a history of the model's own, and from where; `noise` is drawn."""
    which, fraction = torch.stack([torch.rand(2, generator=rng) for rng in rngs]).unbind(1)
    replaced = forced & (which < config.share)
    samples = tuple(replaced.nonzero().flatten().tolist()) or (0,)
    lowest, highest = config.start
    return OwnHistoryDraws(replaced, samples, lowest + (highest - lowest) * fraction, noise)


@torch.no_grad()
def own_history(model: Any, clean: Tensor, start: Tensor, noise: Tensor, history_noise: Tensor, history_t: Tensor,
                steps: int, *, positions: Sequence[int], **options: Any) -> Tensor:
    """Return `clean` (B, c, T, h, w) with all groups but the last, which is nobody's history, made by the model.

    Args:
        start: (B,) levels that a group is noised to, with `noise` (B, c, T, h, w), before the model denoises it.
        history_noise, history_t: what a group is noised with, and the levels (B, T), once it is history.
        steps: of Euler; a flow map takes each without an error of discretisation.
        options: further arguments of the model.
    """
    slices = list(group_slices(clean.shape[2], model.config.group_size))
    times = start[:, None] * torch.linspace(1, 0, steps + 1, device=start.device)
    groups, past = [], None
    for part in slices[:-1]:
        layout = {"groups": (part.stop - part.start,), "positions": positions[part], **options}
        x = interpolate(clean[:, :, part], noise[:, :, part], start)
        for t, r in pairwise(times.unbind(1)):
            levels, toward = (level[:, None].expand(-1, x.shape[2]) for level in (t, r))
            target = {"target_timestep": toward} if model.config.flow_map else {}
            v = model(x, levels, history=past, **target, **layout).sample.float()
            x = x - per_frame(t - r, x) * v
        groups.append(x)
        if part.stop < slices[-1].start:
            noised = interpolate(x, history_noise[:, :, part], history_t[:, part])
            past = model(noised, history_t[:, part], history=past, return_history=True, **layout).history
    return torch.cat([*groups, clean[:, :, slices[-1]]], dim=2)
