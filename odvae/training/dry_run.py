"""What the training of a VAE takes, before it starts, see `trainer.dry_run`."""

from __future__ import annotations

import contextlib

from torch._subclasses.fake_tensor import FakeTensorMode

from ..trainer.dry_run import TrainingPlan, make_plan
from .train import AutoencoderObjective, TrainConfig, make_model


def plan_training(config: TrainConfig, *, processes: int = 1, flops: float | None = None,
                  samples: int | None = None) -> TrainingPlan:
    """Estimate a training. Nothing is trained, read of its data, or written; new weights are not even created. The
    arguments and errors are those of `make_plan`."""
    with FakeTensorMode() if config.model.init_from is None else contextlib.nullcontext():
        model = make_model(config.model)
    objective = AutoencoderObjective(model, config)
    return make_plan(objective, config.loop, critic=objective.critic, processes=processes, flops=flops, samples=samples)
