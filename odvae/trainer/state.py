"""What a training changes from step to step, and as tensors and JSON for a checkpoint: weights, optimizers, EMA."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..utils.errors import UserError
from .checkpoints import flatten_optimizer, unflatten_optimizer
from .objective import Objective
from .optim import OptimizerConfig, learning_rate, make_optimizers, set_learning_rate
from .sharding import gathered, part_of, shard_optimizer_state, whole


class Learner:
    """A network with its optimizers, which go by `settings` from step `begins` on; `prefix` names it in checkpoints.

    What requires no gradient now, as the base under an adapter, is not trained: no optimizer, average or checkpoint
    holds it.
    """

    def __init__(self, model: nn.Module, settings: OptimizerConfig, *, non_muon_pattern: str, prefix: str = "",
                 begins: int = 0) -> None:
        self.model, self.settings, self.prefix, self.begins = model, settings, prefix, begins
        self.frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise UserError(f"no parameter of the {type(model).__name__} requires a gradient: there is nothing to "
                            f"train; unfreeze some of them, or add an adapter")
        self.parameters = list(self.trained.values())
        self.optimizers = make_optimizers(model, settings, non_muon_pattern=non_muon_pattern)

    def set_learning_rate(self, step: int, steps: int, scale: float) -> None:
        value = learning_rate(max(0, step - self.begins), steps - self.begins, self.settings)
        set_learning_rate(self.optimizers, scale * value)

    def clip(self, accelerator: Accelerator) -> float:
        """Clip the gradient; returns its norm before, over all shards, not finite where any part of it is not."""
        norm = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        return float(whole(norm))

    def step(self, *, apply: bool) -> None:
        """Apply the gradient, or drop it."""
        for optimizer in self.optimizers:
            if apply:
                optimizer.step()
            optimizer.zero_grad()

    def changing(self) -> dict[str, Tensor]:
        """What training changes in the model, by name: trained parameters, and buffers."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.frozen}

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors: dict[str, dict[str, Tensor]] = {f"{self.prefix}model": self.changing()}
        meta = {}
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            tensors[name], meta[name] = flatten_optimizer(optimizer.state_dict())
        return tensors, meta

    def unpack(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Raises ValueError or KeyError where the checkpoint is of another network, or another part of it."""
        mine, stored = self.changing(), tensors[f"{self.prefix}model"]
        different = sorted(name for name in mine.keys() | stored.keys()
                           if name not in mine or name not in stored or mine[name].shape != stored[name].shape)
        if different:
            raise ValueError(f"{different[0]} and {len(different) - 1} more are missing, unknown or of another shape")
        for name, tensor in mine.items():
            tensor.copy_(part_of(stored[name], tensor))
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            state = unflatten_optimizer(tensors[name], meta[name])
            shard_optimizer_state(optimizer, state)
            optimizer.load_state_dict(state)


class State:
    """The learners (the model's first), the model's EMA, and how many steps in a row were skipped.

    Args:
        objective: holds the model that is trained, `learners[0].model`.
        own: the caller's model; the same, or where it is trained in shards another, see `sharding`.
    """

    def __init__(self, learners: list[Learner], ema_decay: float, objective: Objective, own: nn.Module) -> None:
        self.learners, self.objective, self.own = learners, objective, own
        self.model = learners[0].model
        self.ema = EMAModel(learners[0].parameters, decay=ema_decay, use_ema_warmup=True, power=0.75)
        self.skipped = 0

    @property
    def sharded(self) -> bool:
        return self.own is not self.model

    def pack(self, *, keep: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by name, and the rest as JSON; of shards the whole tensors, for which all processes call this, and
        which are empty where not `keep`."""
        tensors: dict[str, dict[str, Tensor]] = {"ema": {str(i): p for i, p in enumerate(self.ema.shadow_params)}}
        meta: dict[str, Any] = {"ema_step": self.ema.optimization_step, "skipped": self.skipped}
        for learner in self.learners:
            more_tensors, more_meta = learner.pack()
            tensors |= more_tensors
            meta |= more_meta
        return {name: gathered(group, keep=keep) for name, group in tensors.items()}, meta

    def unpack(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Load what `pack` gave. Raises RuntimeError, ValueError or KeyError where it is of another model."""
        for learner in self.learners:
            learner.unpack(tensors, meta)
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(part_of(tensors["ema"][str(i)], shadow))
        self.ema.optimization_step, self.skipped = meta["ema_step"], meta["skipped"]

    @contextlib.contextmanager
    def evaluating(self, *, main: bool) -> Iterator[None]:
        """In the `main` process the caller's model holds the EMA weights inside the block, on the device, in eval mode;
        and nothing is compiled: samples have many shapes and would use up torch.compile's limit of shapes, so that
        training would go on uncompiled. Afterwards memory is as before. All processes must enter.
        """
        if self.sharded:
            if main:
                nn.Module.to(self.own, self.ema.shadow_params[0].device)
            self._fill_own(keep=main)
            self.objective.model = self.own
        elif main:
            self.ema.store(self.learners[0].parameters)
            self.ema.copy_to(self.learners[0].parameters)
        if main:
            self.own.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.objective.model = self.model
            if self.sharded:
                nn.Module.to(self.own, "cpu")
            elif main:
                self.model.train()
                self.ema.restore(self.learners[0].parameters)
            free_memory()

    def finish(self) -> None:
        """The caller's model holds the EMA weights, in every process, and is the objective's again."""
        if self.sharded:
            nn.Module.to(self.own, self.ema.shadow_params[0].device)
            self._fill_own(keep=True)
            self.objective.model = self.own
        else:
            self.ema.copy_to(self.learners[0].parameters)

    @torch.no_grad()
    def _fill_own(self, *, keep: bool) -> None:
        """The average, and the buffers, from the shards into the caller's model; where not `keep`, help others to."""
        parameters, buffers = dict(self.own.named_parameters()), dict(self.own.named_buffers())
        for name, shadow in zip(self.learners[0].trained, self.ema.shadow_params, strict=True):
            full = whole(shadow)
            if keep:
                parameters[name].copy_(full)
        for name, buffer in self.model.named_buffers():
            buffers[name].copy_(buffer)


def free_memory() -> None:
    """Give back what an evaluation left: cycles, and blocks that the allocator keeps for shapes of samples, between
    which the next step's would not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
