"""The loop that both trainers share: one step after another, each a pure function of (seed, step, rank).

Nothing random is stored. Batch, crop, noise and dropout of step n follow from the seed and n, so that a run that was
stopped goes on from its last checkpoint with bit for bit the values of a run that was not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from pydantic import Field
from torch import Tensor, nn

from .config import Config, load_config, save_config
from .errors import UserError
from .interrupt import asked_to_stop
from .optim import OptimizerConfig
from .progress import bar
from .training_log import Log, check_trackers
from .training_state import Learner, State

logger = logging.getLogger("odvae")


class LoopConfig(Config):
    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # samples a process and pass
    accumulate: int = Field(1, ge=1)  # passes a step; each draws what one process more would draw
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
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


class Batch(Protocol):
    """What `fit` asks of a batch besides handing it on."""

    @property
    def names(self) -> Sequence[str]:
        """Of the clips in it, for a message."""

    @property
    def frames(self) -> int:
        """In all of its samples together, for the speed."""


class Objective(nn.Module):
    """What a trainer optimises: holds `model` and maps a batch to its losses."""

    model: nn.Module
    not_hidden: str  # see `make_optimizers`
    optimizer: OptimizerConfig | None = None  # None: the loop's
    begins: int = 0  # the step where the learning rate's schedule begins

    def forward(self, batch: Any, step: int, rank: int) -> dict[str, Tensor]:
        """-> scalars by name; "loss" is the one that is minimised, the others are for the log. With a critic, "shown"
        is the batch that the critic learns on; without it the critic rests in this step."""
        raise NotImplementedError

    def learning_rate_scale(self, step: int) -> float:
        """Times the schedule's learning rate, the critic's too."""
        return 1.0


def fit(run: Path, loop: LoopConfig, objective: Objective, batch_of: Callable[[int, int, int], Batch],
        evaluate: Callable[[int], dict[str, float]] | None = None,
        critic: Objective | None = None) -> list[dict[str, float]]:
    """Train `objective.model` to `loop.steps`, or go on to there from the newest checkpoint under `run`.

    A step whose loss or gradient is not finite, in any process, is skipped in all of them, and its clips are named.

    Args:
        batch_of: (step, rank, processes) -> batch; a pure function. A step of several passes asks for more ranks than
            there are processes: accumulating twice in one process trains on what two processes train on.
        evaluate: step -> figures for the log, called on the main process with the EMA weights in place; also before
            the first step. The picture that it leaves at `sample_path` goes to the trackers.
        critic: an adversary with optimizers of its own, which learns on what `objective` shows. It must not be a
            submodule of `objective`.

    Returns:
        the log: one dict a logged step. On return the model holds the EMA weights.

    Raises:
        UserError: a checkpoint of another model, `loop.stop_after_skipped` steps skipped in a row (the state is saved).
        KeyboardInterrupt: stopped by a signal (the state is saved).
    """
    accelerator = _accelerator(run, loop)
    rank, processes = accelerator.process_index, accelerator.num_processes
    objectives = [objective] if critic is None else [objective, critic]
    learners = [Learner(one.to(accelerator.device).model, one.optimizer or loop.optimizer, not_hidden=one.not_hidden,
                        prefix=prefix, begins=one.begins)
                for one, prefix in zip(objectives, ("", "critic_"), strict=False)]
    _prepare_model(objective.model, loop)
    state = State(learners, loop.ema_decay)
    start, sums = state.restore(run)
    accelerator.wait_for_everyone()  # from here on one process alone writes
    if accelerator.is_main_process:
        for left in (file for file in run.rglob(".*.tmp-*") if file.is_file()):  # by a killed run, half written
            left.unlink()
    log = Log(run, start, sums, accelerator)
    wrapped = [accelerator.prepare(one) for one in objectives]

    def save(step: int) -> None:
        if accelerator.is_main_process:
            best = log.best_step(loop.keep_best, loop.best_is) if loop.keep_best else None
            state.save(run, step, log.sums, loop.keep, protect=() if best is None else (best,))
        accelerator.wait_for_everyone()

    def is_best(step: int) -> bool:
        return loop.keep_best is not None and log.best_step(loop.keep_best, loop.best_is) == step

    def look(step: int) -> None:
        if evaluate and accelerator.is_main_process:
            with state.evaluating():
                log.write({"step": step, **evaluate(step)})
            log.picture(step)
            if loop.keep_best and loop.keep_best not in log.lines[-1]:
                raise UserError(f"loop.keep_best = {loop.keep_best!r} is no figure of the evaluation, which gives "
                                f"{', '.join(k for k in log.lines[-1] if k != 'step') or 'none'}")

    def passes(step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Forward and backward of every learner; the means of their losses."""
        means: dict[str, float] = {}
        for i, batch in enumerate(batches):
            seen: Any = batch
            for learner, module in zip(learners, wrapped, strict=True):
                waits = contextlib.nullcontext() if i == len(batches) - 1 else accelerator.no_sync(module)
                with waits:
                    with accelerator.autocast():
                        losses = module(seen, step, rank + processes * i)
                    seen = losses.pop("shown", None)
                    accelerator.backward(losses["loss"] / len(batches))
                if learner.prefix:
                    losses.pop("loss")
                for key, value in losses.items():
                    means[key] = means.get(key, 0.0) + float(value.detach()) / len(batches)
                if seen is None:
                    break
        return means

    if start == 0:
        look(0)
    # Where a signal asks to stop, the step at hand is finished first: half a step cannot be resumed.
    with (bar(loop.steps, "train", "step", initial=start, disable=not accelerator.is_main_process) as progress,
          asked_to_stop() as stop):
        for step, batches, waited in prefetch(
                lambda s: [batch_of(s, rank + processes * i, processes * loop.accumulate)
                           for i in range(loop.accumulate)], start, loop.steps):
            for learner in learners:
                learner.set_learning_rate(step, loop.steps, objective.learning_rate_scale(step))
            means = passes(step, batches)
            norms = [learner.clip(accelerator) for learner in learners]
            bad_loss = not all(map(math.isfinite, means.values()))
            bad = bad_loss or not all(map(math.isfinite, norms))
            # All processes take the same way: skip together, stop together.
            somewhere_loss, somewhere_bad, asked = _anywhere(accelerator, bad_loss, bad, stop())
            for learner in learners:
                learner.step(apply=not somewhere_bad)
            state.skipped = state.skipped + 1 if somewhere_bad else 0
            if somewhere_bad and (bad_loss or not somewhere_loss):
                logger.warning("step %d is skipped: the %s is not finite; its clips: %s", step,
                               "loss" if bad_loss else "gradient", ", ".join(n for b in batches for n in b.names))
            if not somewhere_bad:
                state.ema.step(learners[0].parameters)
                named = zip((f"{learner.prefix}grad_norm" for learner in learners), norms, strict=True)
                log.add(means | {name: norm for name, norm in named if norm})  # 0: a critic at rest
            log.add({"skipped": float(somewhere_bad)})
            log.time(waited, processes * sum(batch.frames for batch in batches))
            done = step + 1
            if done % loop.log_every == 0 or done == loop.steps:
                line = log.flush(done, lr=learners[0].optimizers[0].param_groups[0]["lr"])
                progress.set_postfix({k: f"{line[k]:.4g}" for k in ("loss", "frames_per_second", "data_wait")
                                      if k in line}, refresh=False)
            best = False
            if done % loop.evaluate_every == 0 or done == loop.steps:
                look(done)
                (best,) = _anywhere(accelerator, is_best(done))
            give_up = state.skipped >= loop.stop_after_skipped
            if give_up:
                state.skipped = 0  # whoever starts the run again wants it to try
            if done % loop.save_every == 0 or done == loop.steps or best or asked or give_up:
                save(done)
            progress.update(1)
            if give_up:
                raise UserError(f"{loop.stop_after_skipped} steps in a row up to step {step} had a loss or gradient "
                                f"that is not finite; the state is saved in {run}. Lower the learning rate "
                                f"(loop.optimizer.learning_rate), or look at the clips named above")
            if asked:
                logger.warning("stopped after step %d; the same command goes on from there", done)
                raise KeyboardInterrupt
    state.ema.copy_to(learners[0].parameters)
    log.close()
    return log.lines


def _accelerator(run: Path, loop: LoopConfig) -> Accelerator:
    check_trackers(loop.trackers)
    # A batch need not use every parameter: windows from a clip's middle hold no first latent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=loop.precision, kwargs_handlers=[unused],
                              log_with=list(loop.trackers) or None, project_dir=run / "trackers")
    if loop.trackers:
        accelerator.init_trackers(run.name)
    return accelerator


def _prepare_model(model: nn.Module, loop: LoopConfig) -> None:
    """Training mode; checkpointing and compilation in place, so that the names of parameters stay as they are."""
    model.train()
    if loop.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if loop.compile:
        if not getattr(model, "_repeated_blocks", None):
            raise UserError(f"loop.compile=true: {type(model).__name__} has no repeated blocks to compile; leave it "
                            f"out")
        model.compile_repeated_blocks()  # type: ignore[operator]


def _anywhere(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is up in any process; the same answer in all of them."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts: Tensor = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [bool(count) for count in counts.tolist()]


def start_run(run: Path, config: Config) -> None:
    """Make the run's folder and save the resolved config; refuse a folder that holds a run of another config."""
    saved = run / "config.yaml"
    if saved.exists():
        before = load_config(type(config), saved, [])
        differing = [k for k, v in config.model_dump().items() if before.model_dump()[k] != v]
        if differing:
            raise UserError(f"{run} holds a run with another config ({', '.join(differing)} differ); "
                            f"choose another output, or remove that folder")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def prefetch(batches_of: Callable[[int], list[Batch]], start: int,
              stop: int) -> Iterator[tuple[int, list[Batch], float]]:
    """(step, batches, seconds waited for them) in order, with the next step's batches made in the background."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batches_of, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            begun = time.perf_counter()
            batches = ahead.result()
            waited = time.perf_counter() - begun
            ahead = pool.submit(batches_of, step + 1) if step + 1 < stop else None
            yield step, batches, waited
