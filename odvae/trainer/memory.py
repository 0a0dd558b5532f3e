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
from torch.utils.flop_counter import FlopCounterMode

from ..utils.errors import UserError
from ..utils.format import format_bytes
from ..utils.live_memory import LiveMemory
from ..utils.precision import compute_precision
from .checkpointing import Checkpointing, enable_checkpointing, repeated_blocks
from .config import LoopConfig
from .distributed import best_device, gather, start_processes
from .objective import Example, Objective
from .optim import make_optimizers
from .sharding import copy_size
from .throughput import TRAIN_TO_FORWARD

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
        critic: see `trainer.fit`.
        fused: AdamW's update needs no temporary tensors, as on CUDA.

    Raises:
        UserError: the objective has no example of a batch.
    """

    def __init__(self, objective: Objective, loop: LoopConfig, precision: str, *, critic: Objective | None = None,
                 shards: int = 1, fused: bool = False) -> None:
        self.loop, self.precision, self.shards, self.fused = loop, precision, shards, fused
        first = next(objective.model.parameters())
        self._fake: Any = first.fake_mode if isinstance(first, FakeTensor) else FakeTensorMode()
        self._objective, self._critic = self._copy(objective, critic)
        self._blocks = len(blocks) if (blocks := _equal_blocks(objective.model)) is not None else 0
        # Equal blocks take equal memory, so that two of them tell what all take.
        self._short = [self._copy(objective, None, count)[0] for count in (1, 2)] if self._blocks > 2 else [
            self._objective]
        # Before any pass: a stage may freeze parts of the model, which others train.
        self._learners = [self._objective, *([] if self._critic is None else [self._critic])]
        self._gradients = [_trained_bytes(learner.model) for learner in self._learners]
        self._optimizers = [self._optimizer(learner) for learner in self._learners]
        with self._fake:
            self.examples = self._objective.examples()
        if not self.examples:
            raise UserError(f"the memory of {type(objective).__name__} cannot be estimated")

    def _copy(self, objective: Objective, critic: Objective | None,
              blocks: int | None = None) -> tuple[Objective, Objective | None]:
        """Copy objectives without their values, if `blocks` is given with only the first of the model's blocks."""
        with FakeCopyMode(self._fake):
            fake, fake_critic = copy.deepcopy((objective, critic))
        equal = _equal_blocks(fake.model)
        if blocks and equal is not None:
            del equal[blocks:]
        fake.model.train()
        return fake, fake_critic

    def estimate(self, *modes: Checkpointing) -> TrainingMemory:
        """Estimate the memory with each of the modes."""
        networks = {tensor for learner in self._learners for tensor in (*learner.parameters(), *learner.buffers())}
        state, update = (sum(parts) for parts in zip(*self._optimizers, strict=True))
        passes = {mode: self._forward_backward(mode) for mode in modes}
        totals = sum(x.nbytes for x in networks), sum(self._gradients), state, self._gradients[0], update
        weights, gradient, state, average, update = (-(-part // self.shards) for part in totals)
        return TrainingMemory(weights=weights, gradients=gradient, optimizer=state, average=average, update=update,
                              activations={mode: kept for mode, (kept, _) in passes.items()},
                              peak={mode: peak for mode, (_, peak) in passes.items()})

    def _optimizer(self, learner: Objective) -> tuple[int, int]:
        """Bytes of a learner's optimizer, and of what is temporary while it steps."""
        settings = learner.optimizer or self.loop.optimizer
        trained = [p for p in learner.model.parameters() if p.requires_grad]
        with self._fake:
            optimizers = make_optimizers(learner.model, settings, non_muon_pattern=learner.non_muon_pattern)
        adamw = sum(p.numel() for group in optimizers[0].param_groups for p in group["params"])
        muon = sum(p.numel() for p in trained) - adamw
        state = 4 * muon + adamw * (2 if settings.name == "adamw8bit" else 8)
        return state, 0 if self.fused and not muon else 3 * max(p.nbytes for p in trained)

    def flops(self) -> float:
        """FLOPs of a mean step's forward and backward passes, of one micro-batch, without what is computed again."""
        total = 0.0
        for example in self.examples:
            known = self._objective.flops(example.batch)
            if known is None:
                with FlopCounterMode(display=False) as counter:
                    self._measure(self._objective, example, "none")
                total += example.weight * counter.get_total_flops()
            else:
                total += example.weight * TRAIN_TO_FORWARD * known
        return total

    def _forward_backward(self, mode: Checkpointing) -> tuple[int, int]:
        """What is kept by the forward pass, and the peak of both passes."""
        measured = [tuple(map(max, zip(*(self._measure(objective, example, mode) for example in self.examples),
                              strict=True))) for objective in self._short]
        one, two = measured[0], measured[-1]
        more = self._blocks - 1 if len(measured) > 1 else 0
        kept, peak = (first + more * (second - first) for first, second in zip(one, two, strict=True))
        return kept, peak + (self._gathered() if self.shards > 1 else 0)

    def _measure(self, objective: Objective, example: Example, mode: Checkpointing) -> tuple[int, int]:
        """Bytes of live tensors after the forward pass, and their peak, also while the critic learns."""
        model, hooks = objective.model, list[Any]()
        trained = [p for p in model.parameters() if p.requires_grad]
        with self._fake, _checkpointing(model, mode):
            if self.shards > 1:  # full gradients are reduced to shards at once, and full weights are there by block
                hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
            try:
                with LiveMemory() as memory:
                    autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")
                    with autocast:
                        losses = objective(example.batch, example.step, 0)
                    kept, critic_batch = memory.live, losses.pop("critic_batch", None)
                    losses.pop("loss").backward()
                    if self._critic is not None and critic_batch is not None:
                        with autocast:
                            losses = self._critic(critic_batch, example.step, 0)
                        losses.pop("loss").backward()
            finally:
                for hook in hooks:
                    hook.remove()
                for learner in (objective, self._critic):
                    if learner is not None:
                        learner.model.zero_grad()
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


def _equal_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The list of a transformer's repeated blocks; None of a model whose blocks are in several, as of several sizes."""
    blocks = set(repeated_blocks(model))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and {*module} & blocks]
    return lists[0] if len(lists) == 1 and {*lists[0]} == blocks else None


def _trained_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _upper_bound(objective: Objective, critic: Objective | None) -> float | None:
    """More bytes than a training can take; None: unknown."""
    with FakeTensorMode():
        bounds = [objective.activation_bound(example.batch) for example in objective.examples()]
    known = [bound for bound in bounds if bound is not None]
    networks = [objective, *([] if critic is None else [critic])]
    return max(known) + 6 * sum(p.nbytes for each in networks for p in each.parameters()) if known else None


def settle_checkpointing(objective: Objective, loop: LoopConfig, free: int,
                         critic: Objective | None = None) -> LoopConfig:
    """Return `loop` with the mode of checkpointing decided: with auto the first that fits the memory of every process,
    else full, and none for an objective that cannot tell its batches. All processes must call it.

    Args:
        free: bytes that are free on this process's device.
        critic: see `trainer.fit`.
    """
    if loop.gradient_checkpointing != "auto":
        return loop
    return loop.model_copy(update={"gradient_checkpointing": _first_that_fits(objective, loop, free, critic)})


def _first_that_fits(objective: Objective, loop: LoopConfig, free: int, critic: Objective | None) -> Checkpointing:
    usable = int(USABLE * min(gather(free)))
    bound = _upper_bound(objective, critic)
    if bound is None or bound < usable / SMALL:
        return "none"
    device = best_device()
    estimator = MemoryEstimator(objective, loop, compute_precision(loop.mixed_precision, device), critic=critic,
                                shards=copy_size(loop, start_processes().num_processes), fused=device.type == "cuda")
    needed: dict[Checkpointing, int] = {}
    for mode in objective.checkpointing_modes:
        needed[mode] = estimator.estimate(mode).total(mode)
        if needed[mode] <= usable:
            break
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
    logger.info("loop.gradient_checkpointing=%s, by the estimated memory (%s) of %s", mode, listed,
                format_bytes(usable))
    return mode
