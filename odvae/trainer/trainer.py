"""The training loop that both recipes share.

No random state is stored. Batch, crop, noise and dropout of step n depend only on the seed and n, so that a run that is
resumed from a checkpoint reproduces an uninterrupted one: bit for bit on a CPU and with `loop.deterministic`, else to
rounding, as sums on an accelerator depend on the order in which its threads finish.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.compiler import check_compiler
from ..utils.errors import UserError
from ..utils.precision import compute_precision
from ..utils.progress import bar
from .checkpoint_manager import CheckpointManager
from .checkpointing import enable_checkpointing
from .config import LoopConfig, start_run
from .context_parallel import check_context_parallel, enable_context_parallel
from .determinism import use_deterministic_algorithms
from .distributed import any_process, best_device, make_accelerator, reduce_step
from .evaluation import EvaluationGroup
from .metrics import MetricsLogger, check_trackers
from .objective import Batch, Objective
from .pinned import pin
from .sharding import check_sharding, make_mesh, shard
from .signals import graceful_shutdown
from .state import Learner, State
from .throughput import peak_of_run

__all__ = ["Batch", "LoopConfig", "Objective", "fit", "prefetch", "start_run"]

logger = logging.getLogger("odvae")

GetBatch = Callable[[int, int, int], Batch]
Evaluate = Callable[[int, EvaluationGroup], dict[str, float]]


def fit(run: Path, loop: LoopConfig, objective: Objective, get_batch: GetBatch,
        evaluate: Evaluate | None = None, critic: Objective | None = None) -> list[dict[str, float]]:
    """Train `objective.model` for `loop.steps` steps, resuming from the newest checkpoint under `run`.

    A step takes `loop.gradient_accumulation_steps` micro-batches in each process. Micro-batch i of process r has the
    index r + processes * i (those that share samples count as one); `get_batch` returns samples index *
    micro_batch_size + j of the step. Loss and gradient are means over all micro-batches. So two processes, or two
    micro-batches, compute what one of twice the size does, if each sample depends only on its index.

    A step whose loss or gradient is not finite, in any process, is skipped in all of them, and its clips are logged.

    Args:
        get_batch: (step, micro_batch, num_micro_batches) -> batch, a pure function; num_micro_batches is processes *
            `loop.gradient_accumulation_steps`.
        evaluate: (step, group) -> metrics, called in all processes with the EMA weights in `objective.model`, also
            before the first step, in the training's precision. `group` shares out the work. An image saved at
            `sample_path` goes to the trackers.
        critic: an adversary with its own optimizers, which trains on the "critic_batch" of `objective`. It must not be
            a submodule of `objective`.

    Returns:
        the log: one dict per logged step. On return the model holds the EMA weights.

    Raises:
        UserError: a checkpoint of another model or another number of samples per step; `loop.stop_after_skipped`
            consecutive skipped steps (the state is saved); a parallelism that the objective does not support.
        KeyboardInterrupt: stopped by a signal (the state is saved).
    """
    trainer = Trainer(run, loop, objective, evaluate, critic)
    log, accelerator = trainer.log, trainer.accelerator
    if trainer.start == 0:
        trainer.evaluate(0)
    # A signal stops the run only after the current step: half a step cannot be resumed.
    with (bar(loop.steps, "train", "step", initial=trainer.start, disable=not accelerator.is_main_process) as progress,
          graceful_shutdown() as stop, contextlib.closing(trainer.checkpoints)):
        for step, batches, data_wait in prefetch(
                lambda s: trainer.load(s, get_batch), trainer.start, loop.steps):
            stopping = trainer.train_step(step, batches, data_wait, stop)
            done = step + 1
            if done % loop.log_every == 0 or done == loop.steps:
                line = log.flush(done, lr=trainer.learners[0].optimizers[0].param_groups[0]["lr"])
                progress.set_postfix({k: f"{line[k]:.4g}" for k in BAR_METRICS if k in line}, refresh=False)
            best = (done % loop.evaluate_every == 0 or done == loop.steps) and trainer.evaluate(done)
            diverged = trainer.state.skipped >= loop.stop_after_skipped
            if diverged:
                trainer.state.skipped = 0  # a resumed run tries again
            if done % loop.save_every == 0 or done == loop.steps or best or stopping or diverged:
                trainer.save(done)
            progress.update(1)
            if diverged:
                raise UserError(f"{loop.stop_after_skipped} consecutive steps up to step {step} had a loss or gradient "
                                f"that is not finite; the state is saved in {run}. Lower the learning rate "
                                f"(loop.optimizer.learning_rate, with --change-schedule), or check the clips named "
                                f"above")
            if stopping:
                logger.warning("stopped after step %d; run the same command to resume", done)
                raise KeyboardInterrupt
    trainer.state.finish()
    log.close()
    return log.lines


BAR_METRICS = ("loss", "frames_per_second", "tokens_per_second", "mfu", "data_wait")  # beside the progress bar


class Trainer:
    """The objects of a run, and its steps. All processes must call every method."""

    def __init__(self, run: Path, loop: LoopConfig, objective: Objective, evaluate: Evaluate | None,
                 critic: Objective | None) -> None:
        self.loop, self.objective, self._evaluate = loop, objective, evaluate
        if loop.deterministic:
            use_deterministic_algorithms()
        check_trackers(loop.trackers)
        precision = compute_precision(loop.mixed_precision, best_device())
        self.accelerator = make_accelerator(every_parameter=objective.uses_every_parameter and critic is None,
                                            mixed_precision=precision, log_with=list(loop.trackers) or None,
                                            project_dir=run / "trackers")
        if loop.trackers:
            self.accelerator.init_trackers(run.name)
        self.is_main, device = self.accelerator.is_main_process, self.accelerator.device
        check_sharding(objective, loop, critic)
        check_context_parallel(objective, loop, critic, self.accelerator.num_processes)
        replicas = self.accelerator.num_processes // loop.context_parallel  # which have different samples
        self.num_micro_batches = replicas * loop.gradient_accumulation_steps  # per step
        # Indices of this process's micro-batches.
        self.micro_batches = range(self.accelerator.process_index // loop.context_parallel, self.num_micro_batches,
                                   replicas)
        sharded = loop.sharding != "none" and self.accelerator.num_processes > 1
        full_model = objective.model
        if sharded:
            objective.model = copy.deepcopy(nn.Module.to(full_model, "cpu"))
        _prepare_model(objective.model, loop)
        if loop.context_parallel > 1:
            enable_context_parallel(objective.model, device, loop.context_parallel)
        if sharded:
            shard(objective.model, make_mesh(loop, device, self.accelerator.num_processes), precision)
        objectives = [objective] if critic is None else [objective, critic]
        self.learners = [
            Learner(each.to(device).model, each.optimizer or loop.optimizer, non_muon_pattern=each.non_muon_pattern,
                    prefix=prefix, start_step=each.start_step)
            for each, prefix in zip(objectives, ("", "critic_"), strict=False)
        ]
        self.state = State(self.learners, loop.ema_decay, objective, full_model, loop.context_parallel,
                           loop.evaluation_minutes)
        self.checkpoints = CheckpointManager(run, loop, self.state, self.accelerator)
        saved = self.checkpoints.restore()
        self.start = int(saved.get("step", 0))
        peak = peak_of_run(run, device, precision) if self.is_main and objective.reports_flops else None
        self.log = MetricsLogger(run, self.start, saved.get("log", {}), self.accelerator, peak)
        self.modules = objectives if sharded else [self.accelerator.prepare(each) for each in objectives]

    def load(self, step: int, get_batch: GetBatch) -> list[Batch]:
        """Return this process's batches of a step, for a GPU in pinned memory."""
        batches = [get_batch(step, number, self.num_micro_batches) for number in self.micro_batches]
        return [pin(batch) for batch in batches] if self.accelerator.device.type == "cuda" else batches

    def train_step(self, step: int, batches: Sequence[Batch], data_wait: float, stop: Callable[[], bool]) -> bool:
        """Train all learners for one step, or skip it if it is not finite; returns whether any process must stop."""
        for learner in self.learners:
            learner.set_learning_rate(step, self.loop.steps, self.objective.learning_rate_scale(step))
        try:
            losses = self.forward_backward(step, batches)
        except RuntimeError as error:
            if self.loop.deterministic and "deterministic" in str(error):
                raise UserError(f"loop.deterministic=true: {str(error).splitlines()[0]}; leave it out") from error
            raise
        return self.optimizer_step(step, batches, losses, data_wait, stop())

    def optimizer_step(self, step: int, batches: Sequence[Batch], losses: dict[str, Tensor], data_wait: float,
                       stopping: bool) -> bool:
        """Clip, update and average, unless a loss or gradient of any process is not finite; then log. Returns whether
        any process is stopping."""
        norms = {f"{learner.prefix}grad_norm": learner.clip(self.accelerator) for learner in self.learners}
        bad_loss, bad_norm = (any_not_finite(values) for values in (losses.values(), norms.values()))
        # All processes decide alike: skip together, stop together.
        mine, sums = reduce_step(
            self.accelerator, {"bad": bad_loss | bad_norm.to(bad_loss.device), "bad loss": bad_loss} | norms
            | {f"loss {name}": value for name, value in losses.items()},
            {"stopping": stopping} | self._count(batches))
        skip = sums["bad"] > 0
        for learner in self.learners:
            learner.step(apply=not skip)
        self.state.skipped = self.state.skipped + 1 if skip else 0
        if skip and (mine["bad loss"] or not sums["bad loss"]):
            logger.warning("skipping step %d: the %s is not finite; its clips: %s", step,
                           "loss" if mine["bad loss"] else "gradient", ", ".join(n for b in batches for n in b.names))
        if not skip:
            self.state.ema.step(self.learners[0].parameters)
            self.log.add({name: sums[f"loss {name}"] / self.accelerator.num_processes for name in losses})
            self.log.add({name: mine[name] for name in norms if mine[name]})  # 0: an idle critic
        self.log.add({"skipped": float(skip)})
        self.log.throughput.add(data_wait, {name: sums[name] for name in COUNTERS if name in sums})
        return sums["stopping"] > 0

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Run forward and backward of every learner; return the means of their losses, without waiting for them."""
        means: dict[str, Tensor] = {}
        exact = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        for micro_batch, batch in zip(self.micro_batches, batches, strict=True):
            inputs: Any = batch
            for learner, module in zip(self.learners, self.modules, strict=True):
                # Shards are reduced in every pass: full gradients, to be summed first, would not fit in memory.
                last = micro_batch == self.micro_batches[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
                    with self.accelerator.autocast():
                        losses = module(inputs, step, micro_batch)
                    inputs = losses.pop("critic_batch", None)
                    # Gradients are averaged over processes; those that share a sample have parts of a sum.
                    self.accelerator.backward(losses["loss"] * (self.loop.context_parallel / len(batches)))
                if learner.prefix:
                    losses.pop("loss")
                for key, value in losses.items():
                    means[key] = means.get(key, 0.0) + value.detach().to(exact) / len(batches)
                if inputs is None:
                    break
        return means

    def _count(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Count what this process computes in a step, for the throughput."""
        counts: dict[str, Sequence[int | None]] = {"frames": [batch.frames for batch in batches],
                                                   "tokens": [self.objective.tokens(batch) for batch in batches],
                                                   "flops": [self.objective.flops(batch) for batch in batches]}
        return {name: sum(n for n in numbers if n is not None) / self.loop.context_parallel
                for name, numbers in counts.items() if None not in numbers}

    def evaluate(self, step: int) -> bool:
        """Evaluate; returns whether this is the best so far, and must be kept."""
        if self._evaluate is None:
            return False
        best = False
        with self.log.throughput.exclude():
            with self.state.evaluating() as group, self.accelerator.autocast():  # as a step computes
                metrics = self._evaluate(step, group)
            if self.is_main:
                if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
                    logger.warning("the evaluation at step %d is not finite: %s", step, ", ".join(bad))
                self.log.write({"step": step, **metrics})
                self.log.log_image(step)
                self._check_keep_best()
                best = self.checkpoints.best_step(self.log) == step
        return any_process(best)

    def _check_keep_best(self) -> None:
        best, metrics = self.loop.keep_best, self.log.lines[-1].keys() - {"step"}
        if best is not None and best not in metrics:
            raise UserError(f"loop.keep_best = {best!r} is not a metric of the evaluation; choose one of: "
                            f"{', '.join(sorted(metrics)) or 'none'}")

    def save(self, step: int) -> None:
        with self.log.throughput.exclude():
            self.checkpoints.save(step, self.log)


def any_not_finite(values: Iterable[Tensor]) -> Tensor:
    """Whether any of these scalars is NaN or infinite, on their device."""
    return ~torch.stack(list(values)).isfinite().all()


COUNTERS = ("frames", "tokens", "flops")  # of `ThroughputMeter`


def _prepare_model(model: nn.Module, loop: LoopConfig) -> None:
    """Set training mode, checkpointing and compilation, in place, so that parameters keep their names."""
    model.train()
    mode = loop.gradient_checkpointing
    enable_checkpointing(model, "none" if mode == "auto" else mode, compiled=loop.compile)
    if loop.compile:
        if not getattr(model, "_repeated_blocks", None):
            raise UserError(f"loop.compile=true: {type(model).__name__} has no repeated blocks to compile; remove "
                            f"loop.compile")
        check_compiler(best_device())
        # What processes send each other, and the hooks of shards, break a block's graph.
        whole = loop.sharding == "none" and loop.context_parallel == 1
        model.compile_repeated_blocks(**({} if whole else {"fullgraph": False}))  # type: ignore[operator]


def prefetch(get_batches: Callable[[int], list[Batch]], start: int,
             stop: int) -> Iterator[tuple[int, list[Batch], float]]:
    """Yield (step, batches, seconds waited for them), loading the next step's batches in the background."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(get_batches, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            start_wait = time.perf_counter()
            batches = ahead.result()
            data_wait = time.perf_counter() - start_wait
            ahead = pool.submit(get_batches, step + 1) if step + 1 < stop else None
            yield step, batches, data_wait
