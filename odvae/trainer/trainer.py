"""The loop that both trainers share: one step after another, each a pure function of the step and of who asks.

Nothing random is stored. Batch, crop, noise and dropout of step n follow from the seed and n, so that a run that was
stopped goes on from its last checkpoint with bit for bit the values of a run that was not.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from ..utils.errors import UserError
from ..utils.precision import compute_precision
from ..utils.progress import bar
from .checkpoint_manager import CheckpointManager
from .config import LoopConfig, start_run
from .distributed import best_device, make_accelerator, totals
from .metrics import MetricsLogger, check_trackers
from .objective import Batch, Objective
from .sharding import check_sharding, shard
from .signals import graceful_shutdown
from .state import Learner, State
from .throughput import peak_of_run

__all__ = ["Batch", "LoopConfig", "Objective", "fit", "prefetch", "start_run"]

logger = logging.getLogger("odvae")

Evaluate = Callable[[int], dict[str, float]]


def fit(run: Path, loop: LoopConfig, objective: Objective, batch_of: Callable[[int, int, int], Batch],
        evaluate: Evaluate | None = None, critic: Objective | None = None) -> list[dict[str, float]]:
    """Train `objective.model` to `loop.steps`, or go on to there from the newest checkpoint under `run`.

    A step takes `loop.gradient_accumulation_steps` micro batches in each process. Micro batch i of process r has the
    number r + processes * i, and `batch_of` gives it the step's samples number * micro_batch_size + j; loss and
    gradient are means over all micro batches. So two processes, or two micro batches, train what one of twice the size
    does, where a sample follows from its number.

    A step whose loss or gradient is not finite, in any process, is skipped in all of them, and its clips are named.

    Args:
        batch_of: (step, micro_batch, num_micro_batches) -> batch, a pure function; num_micro_batches is processes *
            `loop.gradient_accumulation_steps`.
        evaluate: step -> figures for the log, called on the main process with the EMA weights in `objective.model`;
            also before the first step. The picture that it leaves at `sample_path` goes to the trackers.
        critic: an adversary with optimizers of its own, which learns on what `objective` shows. It must not be a
            submodule of `objective`.

    Returns:
        the log: one dict a logged step. On return the model holds the EMA weights.

    Raises:
        UserError: a checkpoint of another model or of another number of samples a step, `loop.stop_after_skipped`
            steps skipped in a row (the state is saved), a sharding that the training does not allow.
        KeyboardInterrupt: stopped by a signal (the state is saved).
    """
    trainer = Trainer(run, loop, objective, evaluate, critic)
    log, accelerator = trainer.log, trainer.accelerator
    if trainer.start == 0:
        trainer.evaluate(0)
    # Where a signal asks to stop, the step at hand is finished first: half a step cannot be resumed.
    with (bar(loop.steps, "train", "step", initial=trainer.start, disable=not accelerator.is_main_process) as progress,
          graceful_shutdown() as stop):
        for step, batches, waited in prefetch(
                lambda s: [batch_of(s, number, trainer.num_micro_batches) for number in trainer.micro_batches],
                trainer.start, loop.steps):
            stopping = trainer.train_step(step, batches, waited, stop)
            done = step + 1
            if done % loop.log_every == 0 or done == loop.steps:
                line = log.flush(done, lr=trainer.learners[0].optimizers[0].param_groups[0]["lr"])
                progress.set_postfix({k: f"{line[k]:.4g}" for k in SHOWN if k in line}, refresh=False)
            best = (done % loop.evaluate_every == 0 or done == loop.steps) and trainer.evaluate(done)
            give_up = trainer.state.skipped >= loop.stop_after_skipped
            if give_up:
                trainer.state.skipped = 0  # whoever starts the run again wants it to try
            if done % loop.save_every == 0 or done == loop.steps or best or stopping or give_up:
                trainer.save(done)
            progress.update(1)
            if give_up:
                raise UserError(f"{loop.stop_after_skipped} steps in a row up to step {step} had a loss or gradient "
                                f"that is not finite; the state is saved in {run}. Lower the learning rate "
                                f"(loop.optimizer.learning_rate, with --change-schedule), or look at the clips named "
                                f"above")
            if stopping:
                logger.warning("stopped after step %d; the same command goes on from there", done)
                raise KeyboardInterrupt
    trainer.state.finish()
    log.close()
    return log.lines


SHOWN = ("loss", "frames_per_second", "tokens_per_second", "mfu", "data_wait")  # beside the bar


class Trainer:
    """What `fit` holds between its steps. Every method is called in all processes at once."""

    def __init__(self, run: Path, loop: LoopConfig, objective: Objective, evaluate: Evaluate | None,
                 critic: Objective | None) -> None:
        self.loop, self.objective, self._evaluate = loop, objective, evaluate
        check_trackers(loop.trackers)
        precision = compute_precision(loop.mixed_precision, best_device())
        self.accelerator = make_accelerator(mixed_precision=precision, log_with=list(loop.trackers) or None,
                                            project_dir=run / "trackers")
        if loop.trackers:
            self.accelerator.init_trackers(run.name)
        self.main, device = self.accelerator.is_main_process, self.accelerator.device
        self.num_micro_batches = self.accelerator.num_processes * loop.gradient_accumulation_steps  # of a step
        # Those of this process, by number.
        self.micro_batches = range(self.accelerator.process_index, self.num_micro_batches,
                                   self.accelerator.num_processes)
        if loop.sharding == "full":
            check_sharding(objective, objective.optimizer or loop.optimizer, critic)
        sharded = loop.sharding == "full" and self.accelerator.num_processes > 1
        own = objective.model
        if sharded:
            objective.model = copy.deepcopy(nn.Module.to(own, "cpu"))
        _prepare_model(objective.model, loop)
        if sharded:
            shard(objective.model, device, self.accelerator.num_processes, precision)
        objectives = [objective] if critic is None else [objective, critic]
        self.learners = [
            Learner(one.to(device).model, one.optimizer or loop.optimizer, non_muon_pattern=one.non_muon_pattern,
                    prefix=prefix, begins=one.begins)
            for one, prefix in zip(objectives, ("", "critic_"), strict=False)
        ]
        self.state = State(self.learners, loop.ema_decay, objective, own)
        self.checkpoints = CheckpointManager(run, loop, self.state, self.accelerator)
        saved = self.checkpoints.restore()
        self.start = int(saved.get("step", 0))
        peak = peak_of_run(run, device, precision) if self.main and objective.tells_flops else None
        self.log = MetricsLogger(run, self.start, saved.get("log", {}), self.accelerator, peak)
        self.modules = objectives if sharded else [self.accelerator.prepare(one) for one in objectives]

    def train_step(self, step: int, batches: Sequence[Batch], waited: float, stop: Callable[[], bool]) -> bool:
        """One step of all learners, or none where it is not finite; returns whether any process was asked to stop."""
        for learner in self.learners:
            learner.set_learning_rate(step, self.loop.steps, self.objective.learning_rate_scale(step))
        losses = self.forward_backward(step, batches)
        return self.optimizer_step(step, batches, losses, waited, stop())

    def optimizer_step(self, step: int, batches: Sequence[Batch], losses: dict[str, float], waited: float,
                       stopping: bool) -> bool:
        """Clip, update and average, unless a loss or gradient of any process is not finite; log; returns whether any
        process is stopping."""
        norms = [learner.clip(self.accelerator) for learner in self.learners]
        bad_loss = not all(map(math.isfinite, losses.values()))
        bad = bad_loss or not all(map(math.isfinite, norms))
        # All processes take the same way: skip together, stop together.
        everywhere = totals(self.accelerator, {"bad": bad, "bad loss": bad_loss, "stopping": stopping}
                            | self._work(batches) | {f"loss {name}": value for name, value in losses.items()})
        skip = everywhere["bad"] > 0
        for learner in self.learners:
            learner.step(apply=not skip)
        self.state.skipped = self.state.skipped + 1 if skip else 0
        if skip and (bad_loss or not everywhere["bad loss"]):
            logger.warning("step %d is skipped: the %s is not finite; its clips: %s", step,
                           "loss" if bad_loss else "gradient", ", ".join(n for b in batches for n in b.names))
        if not skip:
            self.state.ema.step(self.learners[0].parameters)
            self.log.add({name: everywhere[f"loss {name}"] / self.accelerator.num_processes for name in losses})
            named = zip((f"{learner.prefix}grad_norm" for learner in self.learners), norms, strict=True)
            self.log.add({name: norm for name, norm in named if norm})  # 0: a critic at rest
        self.log.add({"skipped": float(skip)})
        self.log.speed.add(waited, {name: everywhere[name] for name in WORK if name in everywhere})
        return everywhere["stopping"] > 0

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """Forward and backward of every learner; the means of their losses."""
        means: dict[str, float] = {}
        for micro_batch, batch in zip(self.micro_batches, batches, strict=True):
            seen: Any = batch
            for learner, module in zip(self.learners, self.modules, strict=True):
                # Shards are reduced in every pass: to sum whole gradients first is what they are too large for.
                last = micro_batch == self.micro_batches[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
                    with self.accelerator.autocast():
                        losses = module(seen, step, micro_batch)
                    seen = losses.pop("critic_batch", None)
                    self.accelerator.backward(losses["loss"] / len(batches))
                if learner.prefix:
                    losses.pop("loss")
                for key, value in losses.items():
                    means[key] = means.get(key, 0.0) + float(value.detach()) / len(batches)
                if seen is None:
                    break
        return means

    def _work(self, batches: Sequence[Batch]) -> dict[str, float]:
        """What this process does in a step, for the speed."""
        work: dict[str, Sequence[int | None]] = {"frames": [batch.frames for batch in batches],
                                                 "tokens": [self.objective.tokens(batch) for batch in batches],
                                                 "flops": [self.objective.flops(batch) for batch in batches]}
        return {name: float(sum(n for n in numbers if n is not None)) for name, numbers in work.items()
                if None not in numbers}

    def evaluate(self, step: int) -> bool:
        """Evaluate; returns whether this was the best so far, and is to be kept."""
        if self._evaluate is None:
            return False
        best = False
        with self.log.speed.exclude(), self.state.evaluating(main=self.main):
            if self.main:
                figures = self._evaluate(step)
                if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
                    logger.warning("the evaluation at step %d is not finite: %s", step, ", ".join(bad))
                self.log.write({"step": step, **figures})
                self.log.picture(step)
                self._check_keep_best()
                best = self.checkpoints.best_step(self.log) == step
        return totals(self.accelerator, {"best": best})["best"] > 0

    def _check_keep_best(self) -> None:
        figure, figures = self.loop.keep_best, self.log.lines[-1].keys() - {"step"}
        if figure is not None and figure not in figures:
            raise UserError(f"loop.keep_best = {figure!r} is no figure of the evaluation, which gives "
                            f"{', '.join(sorted(figures)) or 'none'}")

    def save(self, step: int) -> None:
        with self.log.speed.exclude():
            self.checkpoints.save(step, self.log)


WORK = ("frames", "tokens", "flops")  # what `ThroughputMeter` counts


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
