"""What a training takes, before it starts: memory by checkpointing mode, tokens and FLOPs of a step, and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from odvae.trainer.checkpointing import MODES, Checkpointing
from odvae.trainer.distributed import best_device
from odvae.trainer.memory import MemoryEstimator, TrainingMemory
from odvae.trainer.sharding import copy_size
from odvae.trainer.throughput import TRAIN_TO_FORWARD, matmul_rate
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes, format_duration

from .config import TrainConfig
from .train import set_up

MFU = 0.4  # share of the fastest matrix product that a training is assumed to reach


@dataclass(frozen=True)
class TrainingPlan:
    """Figures of a training; those of a step are of all processes, and of the largest batch."""

    parameters: int
    trained: int
    memory: TrainingMemory  # of one process
    tokens: int
    samples: int
    flops: int  # forward and backward
    processes: int
    flops_per_second: float  # of one process
    assumed: str  # where that is from
    target_samples: int

    @property
    def seconds(self) -> float:
        """The time for `target_samples`."""
        return self.target_samples / self.samples * self.flops / self.flops_per_second / self.processes

    def lines(self) -> list[str]:
        memory = self.memory
        parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
                 "EMA": memory.average}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
        modes = [f"  gradient_checkpointing={mode}: activations {format_bytes(kept)}, at the peak in all "
                 f"{format_bytes(memory.total(mode))}" for mode, kept in memory.activations.items()]
        return [f"{self.parameters / 1e6:.1f} M parameters, {self.trained / 1e6:.1f} M of them trained",
                f"memory of each of {self.processes} processes: {listed}", *modes,
                f"a step of {self.samples} samples: {self.tokens} tokens, {self.flops / 1e12:.3g} TFLOP",
                f"{self.target_samples} samples: {format_duration(self.seconds)} at {self.flops_per_second / 1e12:.3g} "
                f"TFLOP/s a process ({self.assumed})"]


def plan_training(config: TrainConfig, *, processes: int = 1, flops: float | None = None,
                  samples: int | None = None) -> TrainingPlan:
    """Estimate a training. Nothing is trained or written; new weights are not even created.

    Args:
        processes: as many as would train, each on its accelerator.
        flops: FLOPs per second of one process; None: `MFU` of the fastest matrix product of this machine.
        samples: to estimate the time for; None: those of `loop.steps`.

    Raises:
        UserError: processes that `loop.context_parallel` or `loop.sharding` do not divide, and those of a training.
    """
    loop = config.loop
    shards = copy_size(loop, processes)
    for name, size in (("loop.context_parallel", loop.context_parallel), ("processes that share a copy", shards)):
        if processes % size:
            raise UserError(f"{processes} processes cannot be divided by {name} = {size}")
    objective = set_up(config, weights=False).make_objective()
    bf16 = loop.mixed_precision == "bf16"
    estimator = MemoryEstimator(objective, loop, loop.mixed_precision, shards=shards, fused=True)
    mode = loop.gradient_checkpointing
    modes: tuple[Checkpointing, ...] = MODES if mode == "auto" else (mode,)
    batches = processes // loop.context_parallel * loop.gradient_accumulation_steps
    model, per_batch = objective.model, objective.largest
    assert per_batch is not None
    batch = per_batch.samples * batches
    rate = flops or MFU * matmul_rate(best_device(), torch.bfloat16 if bf16 else torch.float32)
    return TrainingPlan(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory=estimator.estimate(*modes), tokens=objective.tokens(estimator.batch) * batches, samples=batch,
        flops=TRAIN_TO_FORWARD * objective.flops(estimator.batch) * batches, processes=processes,
        flops_per_second=rate, assumed="given" if flops else f"{MFU:.0%} of the fastest product of this machine",
        target_samples=samples or batch * loop.steps)
