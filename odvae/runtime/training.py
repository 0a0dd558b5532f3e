"""The loop that both trainers share: one step after another, each a pure function of (seed, step, rank).

Nothing random is stored. Batch, crop, noise and dropout of step n follow from the seed and n, so that a run that was
stopped goes on from its last checkpoint with bit for bit the values of a run that was not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch import Tensor, nn

from .checkpoints import flatten_optimizer, latest_checkpoint, load_checkpoint, save_checkpoint, unflatten_optimizer
from .config import Config, load_config, save_config
from .errors import UserError
from .files import write_text
from .optim import OptimizerConfig, learning_rate, make_optimizers, set_learning_rate
from .progress import bar

logger = logging.getLogger("odvae")


class LoopConfig(Config):
    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # samples a process and step
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False  # the model's repeated blocks by torch.compile: a minute at the start, faster steps
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)  # checkpoints
    optimizer: OptimizerConfig = OptimizerConfig()


class Objective(nn.Module):
    """What a trainer optimises: holds `model` and maps a batch to its losses."""

    model: nn.Module
    not_hidden: str  # see `make_optimizers`

    def forward(self, batch: Any, step: int, rank: int) -> dict[str, Tensor]:
        """-> scalars by name; "loss" is the one that is minimised, the others are for the log."""
        raise NotImplementedError


def fit(run: Path, loop: LoopConfig, objective: Objective, batch_of: Callable[[int, int, int], Any],
        evaluate: Callable[[int], dict[str, float]] | None = None) -> list[dict[str, float]]:
    """Train `objective.model` to `loop.steps`, or go on to there from the newest checkpoint under `run`.

    Args:
        batch_of: (step, rank, processes) -> batch; a pure function.
        evaluate: step -> figures for the log, called on the main process with the EMA weights in place; also before
            the first step.

    Returns:
        the log: one dict a logged step. On return the model holds the EMA weights.
    """
    # A batch need not use every parameter: windows from a clip's middle hold no first latent.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=loop.precision, kwargs_handlers=[unused])
    rank, processes = accelerator.process_index, accelerator.num_processes
    model = objective.to(accelerator.device).model
    model.train()
    if loop.compile:
        _compile(model)
    optimizers = make_optimizers(model, loop.optimizer, not_hidden=objective.not_hidden)
    ema = EMAModel(model.parameters(), decay=loop.ema_decay, use_ema_warmup=True, power=0.75)
    start, sums = _restore(run, model, optimizers, ema)
    log = Log(run / "metrics.jsonl", start, sums, writes=accelerator.is_main_process)
    wrapped = accelerator.prepare(objective)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def save(step: int) -> None:
        if accelerator.is_main_process:
            _save(run, step, model, optimizers, ema, log.sums, loop.keep)
        accelerator.wait_for_everyone()

    if evaluate and start == 0 and accelerator.is_main_process:
        with evaluating(model):
            log.write({"step": 0, **evaluate(0)})

    # Where a signal asks to stop, the step at hand is finished first: half a step cannot be resumed.
    with (bar(loop.steps, "train", "step", initial=start, disable=not accelerator.is_main_process) as progress,
          asked_to_stop() as stop):
        for step, batch in _prefetch(lambda s: batch_of(s, rank, processes), start, loop.steps):
            set_learning_rate(optimizers, learning_rate(step, loop.steps, loop.optimizer))
            with accelerator.autocast():
                losses = wrapped(batch, step, rank)
            accelerator.backward(losses["loss"])
            norm = accelerator.clip_grad_norm_(parameters, loop.optimizer.clip)
            if not math.isfinite(float(norm)):
                raise UserError(f"the gradient is not finite at step {step} and was not applied; lower "
                                f"loop.optimizer.learning_rate, or look at the batch. {run} holds the last checkpoint")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.step(parameters)
            log.add({**{k: float(v.detach()) for k, v in losses.items()}, "grad_norm": float(norm)})
            done = step + 1
            if done % loop.log_every == 0 or done == loop.steps:
                line = log.flush(done, lr=optimizers[0].param_groups[0]["lr"])
                progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            if evaluate and accelerator.is_main_process and (done % loop.evaluate_every == 0 or done == loop.steps):
                with ema_weights(ema, model), evaluating(model):
                    log.write({"step": done, **evaluate(done)})
            if done % loop.save_every == 0 or done == loop.steps:
                save(done)
            progress.update(1)
            if stop():
                save(done)
                logger.warning("stopped after step %d; the same command goes on from there", done)
                raise KeyboardInterrupt
    ema.copy_to(parameters)
    return log.lines


def _compile(model: nn.Module) -> None:
    """In place, so that the names of parameters stay as they are."""
    if not getattr(model, "_repeated_blocks", None):
        raise UserError(f"loop.compile=true: {type(model).__name__} has no repeated blocks to compile; leave it out")
    model.compile_repeated_blocks()  # type: ignore[operator]


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside the block, Ctrl-C and SIGTERM are only noted, and the function that it yields tells whether one came. A
    second Ctrl-C stops at once. (Outside the main thread signals cannot be caught, and nothing changes.)"""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


class Log:
    """Means of the losses, as JSON lines. A run that goes on drops the lines after the step where it begins."""

    def __init__(self, path: Path, start: int, sums: dict[str, list[float]], *, writes: bool) -> None:
        self.path, self.sums, self.writes = path, sums, writes
        self.lines: list[dict[str, float]] = []
        if path.exists():
            self.lines = [line for line in map(json.loads, path.read_text().splitlines()) if line["step"] <= start]
        if writes:
            write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value)

    def flush(self, step: int, **more: float) -> dict[str, float]:
        line = {"step": step, **{k: sum(v) / len(v) for k, v in self.sums.items()}, **more}
        self.sums = {}
        self.write(line)
        return line

    def write(self, line: dict[str, float]) -> None:
        self.lines.append(line)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def ema_weights(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """The model holds the EMA weights inside the block."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and nothing is compiled: samples have many shapes and would use up torch.compile's
    limit of shapes, so that training would go on uncompiled."""
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train()


def _prefetch(batch_of: Callable[[int], Any], start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """(step, batch) in order, with the next batch made in the background."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch_of, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(batch_of, step + 1) if step + 1 < stop else None
            yield step, batch


def _save(run: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: EMAModel,
          sums: dict[str, list[float]], keep: int) -> None:
    tensors: dict[str, dict[str, Tensor]] = {
        "model": dict(model.state_dict()),
        "ema": {str(i): p for i, p in enumerate(ema.shadow_params)},
    }
    meta: dict[str, Any] = {"ema_step": ema.optimization_step, "log": sums}
    for i, optimizer in enumerate(optimizers):
        tensors[f"optimizer{i}"], meta[f"optimizer{i}"] = flatten_optimizer(optimizer.state_dict())
    save_checkpoint(run / "checkpoints", step, tensors, meta, keep)


def _restore(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer],
             ema: EMAModel) -> tuple[int, dict[str, list[float]]]:
    """Load the newest checkpoint where there is one; returns the step to go on from and the log's open interval."""
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        return 0, {}
    tensors, meta = load_checkpoint(newest)
    try:
        model.load_state_dict(tensors["model"])
    except RuntimeError as error:
        raise UserError(f"{newest} is of another model ({str(error).splitlines()[-1].strip()}); remove {run}, or "
                        f"choose another output") from error
    for i, shadow in enumerate(ema.shadow_params):
        shadow.copy_(tensors["ema"][str(i)])
    ema.optimization_step = meta["ema_step"]
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(unflatten_optimizer(tensors[f"optimizer{i}"], meta[f"optimizer{i}"]))
    logger.info("going on from %s", newest)
    return int(meta["step"]), meta["log"]
