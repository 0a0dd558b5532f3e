"""The interface between a trainer and `fit`: batches, and the objective that maps them to losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .checkpointing import MODES, Checkpointing
from .optim import OptimizerConfig


class Batch(Protocol):
    """What `fit` reads from a batch; otherwise it only passes it on."""

    @property
    def names(self) -> Sequence[str]:
        """Names of its clips, for messages."""

    @property
    def frames(self) -> int:
        """Frames in all of its samples together, for the throughput."""


@dataclass(frozen=True)
class Example:
    """A batch as large as any, to estimate what a training takes: the memory of the largest, the time of their mean."""

    batch: Any  # of tensors with any values
    step: int = 0  # that it is of
    weight: float = 1.0  # what a step of the training takes on average: the sum of weight x what this one takes
    samples: int = 1
    frames: int = 1  # of all samples


class Objective(nn.Module):
    """What a trainer optimizes: holds `model` and maps a batch to its losses.

    `fit` trains the parameters of `model` that require a gradient when it starts. With sharding, `model` is a sharded
    copy of the caller's model during a step, and the caller's model during an evaluation; call it as `self.model(...)`,
    which gathers its parameters.
    """

    model: nn.Module
    non_muon_pattern: str  # see `make_optimizers`
    optimizer: OptimizerConfig | None = None  # None: the loop's
    start_step: int = 0  # the step where the learning rate schedule starts
    can_be_sharded: bool = True
    checkpointing_modes: Sequence[Checkpointing] = MODES  # that differ, the one with most memory first
    uses_every_parameter: bool = False  # of those that are trained, in every batch and process

    def forward(self, batch: Any, step: int, micro_batch: int) -> dict[str, Tensor]:
        """Return scalars by name: "loss" is minimized, the others are logged. With a critic, "critic_batch" is the
        batch that the critic trains on; without it the critic skips this step.

        All processes must return the same names, because the log holds means over processes.

        Args:
            micro_batch: index of the micro-batch within the step, as `fit` passes it to `get_batch`.
        """
        raise NotImplementedError

    def learning_rate_scale(self, step: int) -> float:
        """Return a factor on the scheduled learning rate, also on the critic's."""
        return 1.0

    def example(self) -> Any:
        """Return a batch as large as any, of tensors with any values, to estimate the memory; None: unknown."""
        return None

    def examples(self) -> Sequence[Example]:
        """Return a batch for each kind of steps; none: unknown."""
        batch = self.example()
        return () if batch is None else (Example(batch),)

    def activation_bound(self, batch: Any) -> float | None:
        """Return more bytes than the forward pass keeps for the backward pass, without a trial; None: unknown. By
        default of a transformer: of a token of width D a block keeps some 140 D bytes, in 24 D^2 FLOPs or more."""
        flops = self.flops(batch)
        if flops is None:
            return None
        width = min(max(self.model.parameters(), key=lambda p: p.numel() if p.ndim == 2 else 0).shape)
        return 8 * flops / width

    def tokens(self, batch: Any) -> int | None:
        """Return the tokens of a batch, for tokens per second; None: unknown."""
        return None

    def flops(self, batch: Any) -> int | None:
        """Return the floating-point operations of the model's forward pass on a batch, for the MFU; None: unknown."""
        return None

    @property
    def reports_flops(self) -> bool:
        return type(self).flops is not Objective.flops
