"""The configuration of the training loop, and the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from ..utils.config import Config, differences, load_config, save_config
from ..utils.errors import UserError
from ..utils.precision import compute_precision
from .checkpoints import checkpoint_step, latest_checkpoint
from .determinism import use_deterministic_algorithms
from .distributed import best_device
from .optim import OptimizerConfig

logger = logging.getLogger("odvae")

# Fields that determine the learning rate of future steps; they may change within a run with --change-schedule.
SCHEDULE = {"loop.steps", "loop.optimizer.learning_rate", "loop.optimizer.decay", "loop.optimizer.final"}


class LoopConfig(Config):
    # How a step's samples are distributed over processes (their number is checked against the checkpoint's), how values
    # are computed and kept, and what is logged and saved.
    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch_size",
            "gradient_accumulation_steps",
            "sharding",
            "shard_size",
            "context_parallel",
            "compile",
            "gradient_checkpointing",
            "deterministic",
            "stop_after_skipped",
            "log_every",
            "trackers",
            "evaluate_every",
            "evaluation_minutes",
            "save_every",
            "keep",
            "keep_best",
            "best_is",
        }
    )

    steps: int = Field(1000, ge=1)
    micro_batch_size: int = Field(8, ge=1)  # samples per process and forward-backward pass
    gradient_accumulation_steps: int = Field(1, ge=1)  # passes per step; each draws what one more process would draw
    seed: int = 0
    # auto: bf16 on an accelerator, no on a CPU. bf16 falls back to no on a CPU without instructions for it
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    # full: each process keeps a shard of weights and optimizer (FSDP2); hybrid: copies of the model, each in shards
    sharding: Literal["none", "full", "hybrid"] = "none"
    shard_size: int | None = Field(None, ge=1)  # processes that share a copy with hybrid; None: those of a host
    context_parallel: int = Field(1, ge=1)  # processes that share the tokens of each sample (Ulysses)
    compile: bool = False  # torch.compile the model's repeated blocks: minutes at the start, for each shape
    # Recompute in the backward pass, see `checkpointing`: full is about a third slower, attention less. auto: the first
    # of none, attention, full that fits the memory, as estimated.
    gradient_checkpointing: Literal["auto", "none", "attention", "full"] = "auto"
    deterministic: bool = False  # on an accelerator, bit for bit the same however often a run is repeated or resumed,
    #                              at the cost of slower kernels; on a CPU it always is
    ema_decay: float = Field(0.999, ge=0, lt=1)
    stop_after_skipped: int = Field(5, ge=1)  # consecutive steps whose loss or gradient is not finite
    log_every: int = Field(10, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # in addition to metrics.jsonl
    evaluate_every: int = Field(500, ge=1)
    evaluation_minutes: float | None = Field(5.0, gt=0)  # of an evaluation: the first one settles how many held-out
    #                                                      batches and samples fit; None: all, however long they take
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)  # newest checkpoints
    keep_best: str | None = None  # a metric of the evaluation; its best checkpoint is kept too
    best_is: Literal["highest", "lowest"] = "highest"
    optimizer: OptimizerConfig = OptimizerConfig()


def start_run(run: Path, config: Config, change_schedule: bool = False) -> None:
    """Create the run's folder and save the resolved config; refuse a folder that holds a run with another config,
    unless that run ended before its first checkpoint.

    Fields that do not affect what is learned may differ: `may_change` of each schema lists them.

    Args:
        change_schedule: accept another `loop.steps`, also in the last stage, and another learning rate; the new
            schedule applies from the newest checkpoint on.

    Raises:
        UserError: another config, naming each key with both values; fewer steps than the run has done.
    """
    loop: LoopConfig = config.loop  # type: ignore[attr-defined]
    if loop.deterministic:  # before anything is computed
        use_deterministic_algorithms()
    config, saved = _with_precision(config), run / "config.yaml"
    newest = latest_checkpoint(run / "checkpoints") if saved.exists() else None
    if newest is not None:
        _check_resumable(run, load_config(type(config), saved, []), config, change_schedule)
        steps, done = loop.steps, checkpoint_step(newest)
        if done > steps:
            raise UserError(f"{run} has trained for {done} steps already, but loop.steps is {steps}; give at least "
                            f"{done}, or choose another output")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def _with_precision(config: Config) -> Config:
    """Return the config with the precision that "auto" is on this machine, so that a run that resumes on another one
    does not change it unnoticed."""
    loop = config.loop  # type: ignore[attr-defined]
    precision = compute_precision(loop.mixed_precision, best_device()) if loop.mixed_precision == "auto" else \
        loop.mixed_precision
    return config.model_copy(update={"loop": loop.model_copy(update={"mixed_precision": precision})})


def _check_resumable(run: Path, before: Config, now: Config, change_schedule: bool) -> None:
    different = differences(before, now)
    changes = ", ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in different.items())
    stages = getattr(now, "stages", ())
    schedule = SCHEDULE | {f"stages.{len(stages) - 1}.{name}" for name in ("steps", "learning_rate") if stages}
    if different.keys() - schedule:
        raise UserError(f"{run} holds a run with another config ({changes}); resume with its values, choose another "
                        f"output, or remove the folder")
    if different and not change_schedule:
        raise UserError(f"{run} holds a run with another schedule ({changes}). It sets the learning rate of every "
                        f"step, so it is part of what is learned; resume anyway with --change-schedule, or choose "
                        f"another output")
    if different:
        logger.warning("%s resumes with another schedule (%s): the result differs from a run with either schedule",
                       run, changes)
