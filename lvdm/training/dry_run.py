"""What the training of an LVDM takes, before it starts, see `odvae.trainer.dry_run`."""

from __future__ import annotations

from odvae.trainer.dry_run import TrainingPlan, make_plan

from .config import TrainConfig
from .train import set_up


def plan_training(config: TrainConfig, *, processes: int = 1, flops: float | None = None,
                  samples: int | None = None) -> TrainingPlan:
    """Estimate a training. Nothing is trained or written; new weights are not even created. The arguments and errors
    are those of `make_plan`, and the errors those of a training."""
    objective = set_up(config, weights=False).make_objective()
    return make_plan(objective, config.loop, processes=processes, flops=flops, samples=samples)
