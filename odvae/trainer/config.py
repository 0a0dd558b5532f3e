"""How long, on what and how a training runs; and its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from ..utils.config import Config, differences, load_config, save_config
from ..utils.errors import UserError
from .checkpoints import checkpoint_step, latest_checkpoint
from .optim import OptimizerConfig

logger = logging.getLogger("odvae")

# What decides the learning rate of the steps to come; changed within a run where that is asked for.
SCHEDULE = {"loop.steps", "loop.optimizer.learning_rate", "loop.optimizer.decay", "loop.optimizer.final"}


class LoopConfig(Config):
    # How a step's samples lie over processes (their number is compared with the checkpoint's), how values are computed
    # and kept, and what is logged and saved.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch_size",
            "gradient_accumulation_steps",
            "sharding",
            "compile",
            "gradient_checkpointing",
            "stop_after_skipped",
            "log_every",
            "trackers",
            "evaluate_every",
            "save_every",
            "keep",
            "keep_best",
            "best_is",
        }
    )

    steps: int = Field(1000, ge=1)
    micro_batch_size: int = Field(8, ge=1)  # samples a process and pass
    gradient_accumulation_steps: int = Field(1, ge=1)  # passes a step; each draws what one process more would draw
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16: "no" in its place on a CPU that has no instructions for it
    sharding: Literal["none", "full"] = "none"  # full: each process keeps a part of weights and optimizer (FSDP2)
    compile: bool = False  # the model's repeated blocks by torch.compile: minutes at the start, for each shape
    gradient_checkpointing: bool = False  # recompute in the backward pass: about a third slower, far less memory
    ema_decay: float = Field(0.999, ge=0, lt=1)
    stop_after_skipped: int = Field(5, ge=1)  # steps in a row whose loss or gradient is not finite
    log_every: int = Field(10, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)  # checkpoints, the newest
    keep_best: str | None = None  # a figure of the evaluation; the checkpoint where it was best is kept too
    best_is: Literal["highest", "lowest"] = "highest"
    optimizer: OptimizerConfig = OptimizerConfig()


def start_run(run: Path, config: Config, change_schedule: bool = False) -> None:
    """Make the run's folder and save the resolved config; refuse a folder that holds a run of another config, unless
    that one ended before its first checkpoint.

    What does not change what is learned may differ: `may_change` of each schema names it.

    Args:
        change_schedule: accept other `loop.steps`, also as those of the last stage, and another learning rate. It
            follows the new schedule from the newest checkpoint on.

    Raises:
        UserError: another config, naming each key with both values; fewer steps than the run has behind it.
    """
    saved = run / "config.yaml"
    newest = latest_checkpoint(run / "checkpoints") if saved.exists() else None
    if newest is not None:
        _check_resumable(run, load_config(type(config), saved, []), config, change_schedule)
        steps, done = config.loop.steps, checkpoint_step(newest)  # type: ignore[attr-defined]
        if done > steps:
            raise UserError(f"{run} has trained for {done} steps already, and loop.steps is {steps}: give at least "
                            f"{done}, or choose another output")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def _check_resumable(run: Path, before: Config, now: Config, change_schedule: bool) -> None:
    different = differences(before, now)
    changes = ", ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in different.items())
    stages = getattr(now, "stages", ())
    schedule = SCHEDULE | {f"stages.{len(stages) - 1}.{name}" for name in ("steps", "learning_rate") if stages}
    if different.keys() - schedule:
        raise UserError(
            f"{run} holds a run with another config ({changes}); go on with the values that are there, choose "
            f"another output, or remove that folder"
        )
    if different and not change_schedule:
        raise UserError(f"{run} holds a run with another schedule ({changes}). The learning rate of every step follows "
                        f"from it, to its end, so it is part of what is learned: go on all the same with "
                        f"--change-schedule, or choose another output")
    if different:
        logger.warning("%s goes on with another schedule (%s): it will not be what one run of either would have "
                       "become", run, changes)
