"""How long, on what and how a training runs; and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .config import Config, load_config, save_config
from .errors import UserError
from .optim import OptimizerConfig

# How a step's samples lie over processes, and values over memories: another command may change it within a run.
MAY_CHANGE = {"batch", "accumulate", "sharding"}


class LoopConfig(Config):
    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # samples a process and pass
    accumulate: int = Field(1, ge=1)  # passes a step; each draws what one process more would draw
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"  # bf16: "no" in its place on a CPU that has no instructions for it
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


def start_run(run: Path, config: Config) -> None:
    """Make the run's folder and save the resolved config; refuse a folder that holds a run of another config, unless
    that one ended before its first checkpoint.

    How a step's samples lie over processes and passes, and sharding, may differ: what is trained stays the same.
    """
    saved = run / "config.yaml"
    if saved.exists() and (run / "checkpoints").exists():
        before, now = _fixed(load_config(type(config), saved, [])), _fixed(config)
        differing = [k for k, v in now.items() if before[k] != v]
        if differing:
            raise UserError(f"{run} holds a run with another config ({', '.join(differing)} differ); "
                            f"choose another output, or remove that folder")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def _fixed(config: Config) -> dict[str, Any]:
    """The values that a run keeps to its end."""
    values = config.model_dump()
    values["loop"] = {k: v for k, v in values["loop"].items() if k not in MAY_CHANGE}
    return values
