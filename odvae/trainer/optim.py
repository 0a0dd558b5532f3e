"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..utils.config import Config
from ..utils.errors import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon, as in torch
MIN_NORM = 1e-7


class OptimizerConfig(Config):
    # muon: Muon for hidden matrices and kernels, AdamW for the rest. adamw8bit: bitsandbytes', a quarter of the state.
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(100, ge=0)  # steps of linear warm-up
    decay: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate, from warm-up to the last step
    final: float = Field(0.0, ge=0, le=1)  # final learning rate as a share of `learning_rate`
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(1.0, gt=0)  # gradient norm


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon ("match_rms_adamw": an update has the size of AdamW's, so that one learning rate serves both),
    also for convolution kernels, as matrices (out, in * k_t * k * k). On a CPU it computes in float32; torch's uses
    bfloat16, for which most CPUs have no instructions.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95,
                 ns_steps: int = 4) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                grad = kernel.grad.flatten(1)
                state = self.state[kernel]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                average = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalize(grad.lerp(average, group["momentum"]), group["ns_steps"])
                size = group["lr"] * 0.2 * math.sqrt(max(grad.shape))
                kernel.mul_(1 - group["lr"] * group["weight_decay"])
                kernel.add_(update.view(kernel.shape), alpha=-size)


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """(m, n) -> approximately the nearest matrix whose singular values are 1, by Newton-Schulz steps
    x <- a x + (b g + c g^2) x with g = x x^T (Muon, https://kellerjordan.github.io/posts/muon)."""
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x if x.device.type == "cpu" else x.bfloat16()
    x = x / x.norm().clamp(min=MIN_NORM)
    x = (_newton_schulz_gram if x.device.type == "cpu" else _newton_schulz)(x, steps)
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype).contiguous()


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_gram(x: Tensor, steps: int) -> Tensor:
    """Compute the same, up to rounding, with every product but the first and last on m x m matrices: the steps multiply
    x by a polynomial of its first g. Kernels are much wider than high. For float32; bfloat16 has too few digits."""
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype)
    for remaining in reversed(range(steps)):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        if remaining:
            gram = factor @ gram @ factor
    return product @ x


def make_optimizers(model: nn.Module, config: OptimizerConfig, *, non_muon_pattern: str) -> list[torch.optim.Optimizer]:
    """Return an AdamW, or an AdamW and a Muon for hidden matrices, for the parameters that require a gradient.

    Args:
        non_muon_pattern: regular expression that matches names of parameters that are not hidden matrices (input and
            output layers, embeddings, modulation), for which Muon's orthogonal steps are not meant.

    Raises:
        UserError: the optimizer's package is not installed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named
              if config.name == "muon" and p.ndim >= 2 and not re.search(non_muon_pattern, name)]
    hidden_ids = {id(p) for p in hidden}
    others = [p for _, p in named if id(p) not in hidden_ids]
    decay = [p for p in others if p.ndim >= 2]
    no_decay = [p for p in others if p.ndim < 2]
    fused = {"fused": True} if config.name != "adamw8bit" and others and all(p.is_cuda for p in others) else {}
    optimizers: list[torch.optim.Optimizer] = [_adamw(config.name)(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=config.betas, **fused)]
    if hidden:
        optimizers.append(Muon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay))
    return optimizers


def _adamw(name: str) -> Any:
    """Return the AdamW class of this name. Raises UserError if its package is not installed."""
    if name != "adamw8bit":
        return torch.optim.AdamW
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise UserError(f"the optimizer adamw8bit needs bitsandbytes, which cannot be imported ({error}); "
                        f"pip install bitsandbytes, or use optimizer.name=adamw") from error


IMPLEMENTATION = ("foreach", "fused", "capturable")  # how torch's optimizers compute, not what


def keep_implementation(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Let a saved state dict, perhaps of another device, have the optimizer's own implementation."""
    for mine, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        saved |= {name: mine[name] for name in IMPLEMENTATION if name in mine}


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then decay to `final`."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.decay]
    return config.learning_rate * (config.final + (1 - config.final) * factor)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value
