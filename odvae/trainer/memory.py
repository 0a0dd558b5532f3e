"""Estimate the memory of a training, without computing anything: forward and backward run on fake tensors."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from ..utils.errors import UserError
from ..utils.format import format_bytes
from ..utils.live_memory import LiveMemory
from ..utils.precision import compute_precision
from .checkpointing import MODES, Checkpointing, enable_checkpointing, repeated_blocks
from .config import LoopConfig
from .distributed import best_device, gather, start_processes
from .objective import Objective
from .optim import make_optimizers
from .sharding import copy_size

logger = logging.getLogger("odvae")

USABLE = 0.9  # share of the free memory for live tensors; the rest is for workspaces, and for gaps between tensors
SMALL = 4  # a training that takes less than the free memory / this by an upper bound is not estimated


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in one process. By mode: `activations`, what the forward pass keeps for the backward pass, and `peak`, of
    both, with gradients and gathered weights."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    update: int  # temporary, while the optimizer steps
    activations: dict[Checkpointing, int] = field(default_factory=dict)
    peak: dict[Checkpointing, int] = field(default_factory=dict)

    @property
    def constant(self) -> int:
        """Bytes that are held all the time."""
        return self.weights + self.optimizer + self.average

    def total(self, mode: Checkpointing) -> int:
        """The peak of a step."""
        return self.constant + max(self.peak[mode], self.gradients + self.update)


class MemoryEstimator:
    """Estimates the memory of training `objective` with `loop`, in one of `shards` processes that share a copy.

    Args:
        precision: "no" or "bf16", as accelerate takes it.
        fused: AdamW's update needs no temporary tensors, as on CUDA.

    Raises:
        UserError: the objective has no example of a batch.
    """

    def __init__(self, objective: Objective, loop: LoopConfig, precision: str, *, shards: int = 1,
                 fused: bool = False) -> None:
        self.loop, self.precision, self.shards, self.fused = loop, precision, shards, fused
        first = next(objective.model.parameters())
        self._fake: Any = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode()
        self._objective = self._copy(objective)
        self._blocks = len(repeated_blocks(objective.model))
        # Equal blocks take equal memory, so that two of them tell what all take.
        self._short = [self._copy(objective, count) for count in (1, 2)] if self._blocks > 2 else [self._objective]
        with self._fake:
            batch = self._objective.example()
        if batch is None:
            raise UserError(f"the memory of {type(objective).__name__} cannot be estimated")
        self.batch: Any = batch

    def _copy(self, objective: Objective, blocks: int | None = None) -> Objective:
        """Copy an objective without its values, if `blocks` is given with only the first of its model's blocks."""
        with FakeCopyMode(self._fake):
            fake = copy.deepcopy(objective)
        for module in list(fake.model.modules()):
            if blocks and isinstance(module, nn.ModuleList) and set(module) <= set(repeated_blocks(fake.model)):
                del module[blocks:]
        fake.model.train()
        return fake

    def estimate(self, *modes: Checkpointing) -> TrainingMemory:
        """Estimate the memory with each of the modes."""
        model, settings = self._objective.model, self._objective.optimizer or self.loop.optimizer
        trained = [p for p in model.parameters() if p.requires_grad]
        with self._fake:
            optimizers = make_optimizers(model, settings, non_muon_pattern=self._objective.non_muon_pattern)
        adamw = sum(p.numel() for group in optimizers[0].param_groups for p in group["params"])
        muon = sum(p.numel() for p in trained) - adamw
        state = 4 * muon + adamw * (2 if settings.name == "adamw8bit" else 8)
        largest = max(p.nbytes for p in trained)
        gradients = sum(p.nbytes for p in trained)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        update = 0 if self.fused and not muon else 3 * largest
        passes = {mode: self._forward_backward(mode) for mode in modes}
        weights, gradients, state, update = (-(-part // self.shards) for part in (weights, gradients, state, update))
        return TrainingMemory(weights=weights, gradients=gradients, optimizer=state, average=gradients, update=update,
                              activations={mode: kept for mode, (kept, _) in passes.items()},
                              peak={mode: peak for mode, (_, peak) in passes.items()})

    def _forward_backward(self, mode: Checkpointing) -> tuple[int, int]:
        """What is kept by the forward pass, and the peak of both passes."""
        measured = [self._measure(objective, mode) for objective in self._short]
        one, two = measured[0], measured[-1]
        more = self._blocks - 1 if len(measured) > 1 else 0
        kept, peak = (first + more * (second - first) for first, second in zip(one, two, strict=True))
        return kept, peak + (self._gathered() if self.shards > 1 else 0)

    def _measure(self, objective: Objective, mode: Checkpointing) -> tuple[int, int]:
        """Bytes of live tensors after the forward pass, and their peak."""
        model, hooks = objective.model, list[Any]()
        trained = [p for p in model.parameters() if p.requires_grad]
        with self._fake, _checkpointing(model, mode):
            if self.shards > 1:  # full gradients are reduced to shards at once, and full weights are there by block
                hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
            try:
                with LiveMemory() as memory:
                    with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                        loss = objective(self.batch, 0, 0)["loss"]
                    kept = memory.live
                    loss.backward()
                    del loss
            finally:
                for hook in hooks:
                    hook.remove()
                for parameter in trained:
                    parameter.grad = None
        return kept, memory.peak

    def _gathered(self) -> int:
        """What sharding holds besides: the shards of gradients, and the full weights outside of blocks and of two
        blocks."""
        model = self._objective.model
        blocks = repeated_blocks(model)
        sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        outside = sum(p.nbytes for p in model.parameters()) - sum(sizes)
        width = 2 if self.precision == "bf16" else 4
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad) // self.shards
        return gradients + (outside + 2 * max(sizes, default=0)) * width // 4


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _checkpointing(model: Any, mode: Checkpointing) -> Iterator[None]:
    if mode == "none":
        yield
        return
    enable_checkpointing(model, mode)
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def _upper_bound(model: nn.Module, flops: int) -> float:
    """More bytes than a training can take: of a token of width D a block keeps some 140 D bytes, in 24 D^2 FLOPs or
    more."""
    width = min(max(model.parameters(), key=lambda p: p.numel() if p.ndim == 2 else 0).shape)
    return 8 * flops / width + 6 * sum(p.nbytes for p in model.parameters())


def settle_checkpointing(objective: Objective, loop: LoopConfig, free: int) -> LoopConfig:
    """Return `loop` with the mode of checkpointing decided: with auto the first that fits the memory of every process,
    else full, and none for an objective that cannot tell its batches. All processes must call it.

    Args:
        free: bytes that are free on this process's device.
    """
    if loop.gradient_checkpointing != "auto":
        return loop
    return loop.model_copy(update={"gradient_checkpointing": _first_that_fits(objective, loop, free)})


def _first_that_fits(objective: Objective, loop: LoopConfig, free: int) -> Checkpointing:
    usable = int(USABLE * min(gather(free)))
    with FakeTensorMode():
        batch = objective.example()
        flops = None if batch is None else objective.flops(batch)
    if flops is None or _upper_bound(objective.model, flops) < usable / SMALL:
        return "none"
    device = best_device()
    estimator = MemoryEstimator(objective, loop, compute_precision(loop.mixed_precision, device),
                                shards=copy_size(loop, start_processes().num_processes), fused=device.type == "cuda")
    needed: dict[Checkpointing, int] = {}
    for mode in MODES:
        needed[mode] = estimator.estimate(mode).total(mode)
        if needed[mode] <= usable:
            break
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
    logger.info("loop.gradient_checkpointing=%s, by the estimated memory (%s) of %s", mode, listed,
                format_bytes(usable))
    return mode
