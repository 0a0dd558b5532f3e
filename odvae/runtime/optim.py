"""Optimizers and the learning rate as a function of the step, for both trainers."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from .config import Config
from .errors import UserError


class OptimizerConfig(Config):
    # muon: hidden matrices and kernels by Muon, all else by AdamW. adamw8bit: of bitsandbytes, a quarter of the state.
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(100, ge=0)  # steps of linear warm-up
    decay: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate, from there to the last step
    final: float = Field(0.0, ge=0, le=1)  # share of the learning rate that the decay ends on
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(1.0, gt=0)  # gradient norm


class KernelMuon(torch.optim.Muon):
    """torch's Muon, for convolution kernels as well: each is seen as a matrix (out, in * k_t * k * k)."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        self.kernels = list(params)
        super().__init__([p.detach().flatten(1) for p in self.kernels], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        matrices = self.param_groups[0]["params"]
        for matrix, kernel in zip(matrices, self.kernels, strict=True):
            # Anew in every step: DistributedDataParallel gives parameters another storage, a layout may be changed too.
            matrix.data = kernel.detach().flatten(1)
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        loss = super().step(closure)
        for matrix, kernel in zip(matrices, self.kernels, strict=True):
            if matrix.data_ptr() != kernel.data_ptr():
                kernel.copy_(matrix.view_as(kernel))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None


def make_optimizers(model: nn.Module, config: OptimizerConfig, *, not_hidden: str) -> list[torch.optim.Optimizer]:
    """One AdamW, or a Muon for hidden matrices and an AdamW for the rest; of what requires a gradient.

    Args:
        not_hidden: regular expression; a parameter whose name it finds is not a hidden matrix (what reads the input or
            writes the output, embeddings, modulation): Muon's orthogonal steps are not meant for these.

    Raises:
        UserError: an optimizer of a package that is not installed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named
              if config.name == "muon" and p.ndim >= 2 and not re.search(not_hidden, name)]
    chosen = {id(p) for p in hidden}
    others = [p for _, p in named if id(p) not in chosen]
    decay = [p for p in others if p.ndim >= 2]
    plain = [p for p in others if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = [_adamw(config.name)(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=config.betas)]
    if hidden:
        # match_rms_adamw: an update has the size of AdamW's, so that one learning rate serves both.
        optimizers.append(KernelMuon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay, ns_steps=4,
                                     adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _adamw(name: str) -> Any:
    """The class. Raises UserError where it is another package's, which is not installed."""
    if name != "adamw8bit":
        return torch.optim.AdamW
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise UserError(f"the optimizer adamw8bit needs bitsandbytes, which cannot be imported ({error}); "
                        f"pip install bitsandbytes, or take optimizer.name=adamw") from error


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then one decay to `final`: a pure function of the step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.decay]
    return config.learning_rate * (config.final + (1 - config.final) * left)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
