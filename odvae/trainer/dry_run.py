"""What a training takes, before it starts: memory by checkpointing mode, FLOPs of a step, and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..utils.errors import UserError
from ..utils.format import format_bytes, format_duration
from .config import LoopConfig
from .distributed import best_device
from .memory import MemoryEstimator, TrainingMemory
from .objective import Objective
from .sharding import check_sharding, copy_size
from .throughput import matmul_rate

MFU = 0.4  # share of the fastest matrix product that a training is assumed to reach


@dataclass(frozen=True)
class TrainingPlan:
    """Figures of a training; those of a step are of all processes. The size is that of the largest batch."""

    parameters: int
    trained: int
    memory: TrainingMemory  # of one process
    samples: int
    size: str  # of all samples
    flops: float  # forward and backward, on average
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
                f"a step of {self.samples} samples: {self.size}, {self.flops / 1e12:.3g} TFLOP",
                f"{self.target_samples} samples: {format_duration(self.seconds)} at {self.flops_per_second / 1e12:.3g} "
                f"TFLOP/s a process ({self.assumed})"]


def make_plan(objective: Objective, loop: LoopConfig, *, critic: Objective | None = None, processes: int = 1,
              flops: float | None = None, samples: int | None = None) -> TrainingPlan:
    """Estimate a training. Nothing is trained or written.

    Args:
        critic: see `trainer.fit`.
        processes: as many as would train, each on its accelerator.
        flops: FLOPs per second of one process; None: `MFU` of the fastest matrix product of this machine.
        samples: to estimate the time for; None: those of `loop.steps`.

    Raises:
        UserError: numbers that are not above 0, a sharding that the objective does not support, processes that
            `loop.context_parallel` or `loop.sharding` do not divide.
    """
    if min(processes, flops or 1, 1 if samples is None else samples) <= 0 or flops == 0:
        raise UserError("--processes, --flops and --samples must be above 0")
    check_sharding(objective, loop, critic)
    shards = copy_size(loop, processes)
    for name, size in (("loop.context_parallel", loop.context_parallel), ("processes that share a copy", shards)):
        if processes % size:
            raise UserError(f"{processes} processes cannot be divided by {name} = {size}")
    estimator = MemoryEstimator(objective, loop, loop.mixed_precision, critic=critic, shards=shards, fused=True)
    mode, bf16 = loop.gradient_checkpointing, loop.mixed_precision == "bf16"
    modes = objective.checkpointing_modes if mode == "auto" else (mode,)
    batches = processes // loop.context_parallel * loop.gradient_accumulation_steps
    largest = max(estimator.examples, key=lambda example: example.frames)
    tokens, model = objective.tokens(largest.batch), objective.model
    rate = flops or MFU * matmul_rate(best_device(), torch.bfloat16 if bf16 else torch.float32)
    return TrainingPlan(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory=estimator.estimate(*modes), samples=largest.samples * batches,
        size=f"{largest.frames * batches} frames" if tokens is None else f"{tokens * batches} tokens",
        flops=estimator.flops() * batches, processes=processes, flops_per_second=rate,
        assumed="given" if flops else f"{MFU:.0%} of the fastest product of this machine",
        target_samples=samples or largest.samples * batches * loop.steps)
