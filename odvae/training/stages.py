"""Stages of a training, with data, losses and learning rate of their own (images, clips, longer clips, adversarial)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from pydantic import Field

from ..data.dataset import DataConfig, VideoBatch
from ..losses.reconstruction import LossConfig
from ..trainer.objective import Example
from ..utils.config import Config, override
from ..utils.errors import UserError


class StageConfig(Config):
    steps: int = Field(ge=1)
    data: dict[str, Any] = Field(default_factory=dict)  # overrides of the run's `data`
    loss: dict[str, Any] = Field(default_factory=dict)  # overrides of the run's `loss`
    freeze_encoder: bool | None = None  # None: as the run
    learning_rate: float = Field(1.0, gt=0)  # a factor on the schedule, which spans all stages


@dataclass(frozen=True)
class Stage:
    """A stage with every value resolved."""

    begin: int  # its first step
    end: int  # the step after its last
    data: DataConfig
    loss: LossConfig
    freeze_encoder: bool
    learning_rate: float

    def example(self, micro_batch_size: int, steps: int) -> Example:
        """Return the largest batch of its buckets, of its last step, when all of its loss terms are at work.

        Args:
            micro_batch_size: of buckets that have none of their own.
            steps: of the whole training.
        """
        windows = self.data.windows()
        shapes = [(w.batch or micro_batch_size, 3, w.frames, w.height, w.width) for w in windows]
        largest, total = max(shapes, key=prod), sum(w.weight for w in windows)
        mean = sum(w.weight * prod(shape) for w, shape in zip(windows, shapes, strict=True)) / total
        batch = VideoBatch(torch.empty(largest, dtype=torch.uint8), ())
        share = (self.end - self.begin) / steps
        return Example(batch, self.end - 1, share * mean / prod(largest), largest[0], batch.frames)


def resolve_stages(stages: tuple[StageConfig, ...], steps: int, data: DataConfig, loss: LossConfig,
                   freeze_encoder: bool) -> list[Stage]:
    """Resolve the stages of a run of `steps` steps; without any, the run is one stage.

    Raises:
        UserError: an invalid value, stages that do not add up to the run, critics that differ.
    """
    if not stages:
        return [Stage(0, steps, data, loss, freeze_encoder, 1.0)]
    bounds = list(accumulate((stage.steps for stage in stages), initial=0))
    if bounds[-1] != steps:
        raise UserError(f"the stages add up to {bounds[-1]} steps, but loop.steps is {steps}; make them equal")
    resolved = [Stage(begin, end, override(data, stage.data, f"stages.{i}.data"),
                      override(loss, stage.loss, f"stages.{i}.loss"),
                      freeze_encoder if stage.freeze_encoder is None else stage.freeze_encoder, stage.learning_rate)
                for i, (stage, (begin, end)) in enumerate(zip(stages, pairwise(bounds), strict=True))]
    for part in ("adversarial.critic", "perceptual.kind", "perceptual.weights"):
        term, name = part.split(".")
        if len({getattr(getattr(stage.loss, term), name) for stage in resolved}) > 1:
            raise UserError(f"loss.{part} differs between stages, which share one network; set it once, in the run's "
                            f"loss.{term}")
    return resolved


def first_step(stages: list[Stage], term: str) -> int | None:
    """Return the step from which a loss term counts its start and ramp: the start of the first stage that uses it."""
    return next((stage.begin for stage in stages if getattr(stage.loss, term).weight > 0), None)
