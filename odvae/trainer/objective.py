"""What a trainer gives to `fit`: batches, and the objective that maps them to losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .optim import OptimizerConfig


class Batch(Protocol):
    """What `fit` asks of a batch besides handing it on."""

    @property
    def names(self) -> Sequence[str]:
        """Of the clips in it, for a message."""

    @property
    def frames(self) -> int:
        """In all of its samples together, for the speed."""


class Objective(nn.Module):
    """What a trainer optimises: holds `model` and maps a batch to its losses.

    Of `model` those parameters are trained that require a gradient when `fit` begins. In a sharded training `model` is
    a sharded copy of the caller's while a step runs, and the caller's own while an evaluation does; it must be called
    as `self.model(...)`, which is where its parameters are gathered.
    """

    model: nn.Module
    non_muon_pattern: str  # see `make_optimizers`
    optimizer: OptimizerConfig | None = None  # None: the loop's
    begins: int = 0  # the step where the learning rate's schedule begins
    can_be_sharded: bool = True

    def forward(self, batch: Any, step: int, micro_batch: int) -> dict[str, Tensor]:
        """-> scalars by name; "loss" is the one that is minimised, the others are for the log. With a critic,
        "critic_batch" is the batch that the critic learns on; without it the critic rests in this step.

        Args:
            micro_batch: its number among those of the step, as `fit` numbers them for `batch_of`.

        The names must be the same in all processes, for the log holds means over them.
        """
        raise NotImplementedError

    def learning_rate_scale(self, step: int) -> float:
        """Times the schedule's learning rate, the critic's too."""
        return 1.0

    def tokens(self, batch: Any) -> int | None:
        """Tokens of a batch, for the log's tokens a second; None: unknown."""
        return None

    def flops(self, batch: Any) -> int | None:
        """Floating-point operations of the model's forward pass over a batch, for the log's MFU; None: unknown."""
        return None

    @property
    def tells_flops(self) -> bool:
        return type(self).flops is not Objective.flops
