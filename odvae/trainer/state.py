"""The state of a training, weights, optimizers and EMA, and its form in a checkpoint: tensors and JSON."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..utils.devices import empty_cache
from ..utils.errors import UserError
from .checkpoints import flatten_optimizer, unflatten_optimizer
from .context_parallel import disable_context_parallel
from .evaluation import EvaluationBudget, EvaluationGroup
from .objective import Objective
from .optim import OptimizerConfig, keep_implementation, learning_rate, make_optimizers, set_learning_rate
from .sharding import JoinedForward, full_tensor, shard_optimizer_state, swap, to_shard


class Learner:
    """A network with its optimizers, whose schedule starts at `start_step`; `prefix` names it in checkpoints.

    Parameters that require no gradient now, such as the base under an adapter, are not trained, and are in no
    optimizer, average or checkpoint.
    """

    def __init__(self, model: nn.Module, settings: OptimizerConfig, *, non_muon_pattern: str, prefix: str = "",
                 start_step: int = 0) -> None:
        self.model, self.settings, self.prefix, self.start_step = model, settings, prefix, start_step
        self.frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise UserError(f"no parameter of the {type(model).__name__} requires a gradient, so there is nothing to "
                            f"train; unfreeze some, or add an adapter")
        self.parameters = list(self.trainable.values())
        self.optimizers = make_optimizers(model, settings, non_muon_pattern=non_muon_pattern)

    def set_learning_rate(self, step: int, steps: int, scale: float) -> None:
        value = learning_rate(max(0, step - self.start_step), steps - self.start_step, self.settings)
        set_learning_rate(self.optimizers, scale * value)

    def clip(self, accelerator: Accelerator) -> Tensor:
        """Clip the gradient; returns its norm before clipping, over all shards; not finite if any part is not."""
        norm: Tensor = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        # 0 on the CPU if there is no gradient.
        return full_tensor(norm).to(accelerator.device, non_blocking=True)

    def step(self, *, apply: bool) -> None:
        """Apply the gradient, or drop it."""
        for optimizer in self.optimizers:
            if apply:
                optimizer.step()
            optimizer.zero_grad()

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training changes in the model, by name: trained parameters and buffers."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.frozen}

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors: dict[str, dict[str, Tensor]] = {f"{self.prefix}model": self.trained_state()}
        meta = {}
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            tensors[name], meta[name] = flatten_optimizer(optimizer.state_dict())
        return tensors, meta

    def unpack(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Load what `pack` returned. ValueError or KeyError if the checkpoint belongs to another network."""
        current, stored = self.trained_state(), tensors[f"{self.prefix}model"]
        different = sorted(name for name in current.keys() | stored.keys()
                           if name not in current or name not in stored or current[name].shape != stored[name].shape)
        if different:
            raise ValueError(f"{different[0]} and {len(different) - 1} more are missing, unknown or of another shape")
        for name, tensor in current.items():
            tensor.copy_(to_shard(stored[name], tensor))
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            state = unflatten_optimizer(tensors[name], meta[name])
            shard_optimizer_state(optimizer, state)
            keep_implementation(optimizer, state)
            optimizer.load_state_dict(state)

    def likes(self) -> dict[str, dict[str, Tensor]]:
        """See `State.likes`."""
        likes = {f"{self.prefix}model": self.trained_state()}
        for i, optimizer in enumerate(self.optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            likes[f"{self.prefix}optimizer{i}"] = {str(number): p for number, p in enumerate(parameters)}
        return likes


class State:
    """The learners (the model's first), the model's EMA, the number of consecutive skipped steps, and how much is
    evaluated.

    Args:
        objective: holds the model that is trained, `learners[0].model`.
        full_model: the caller's model; with sharding not the one that is trained, see `sharding`.
        together: processes that share the tokens of a sample.
        evaluation_minutes: see `EvaluationBudget`.
    """

    def __init__(self, learners: list[Learner], ema_decay: float, objective: Objective, full_model: nn.Module,
                 together: int, evaluation_minutes: float | None) -> None:
        self.together, self.budget = together, EvaluationBudget(evaluation_minutes)
        self.learners, self.objective, self.full_model = learners, objective, full_model
        self.model = learners[0].model
        # With foreach a few kernels update all parameters; on a CPU it would only round differently.
        self.ema = EMAModel(learners[0].parameters, decay=ema_decay, use_ema_warmup=True, power=0.75,
                            foreach=learners[0].parameters[0].device.type != "cpu")
        self.skipped = 0

    @property
    def sharded(self) -> bool:
        return self.full_model is not self.model

    @property
    def average(self) -> dict[str, Tensor]:
        """The EMA of the trained parameters, by name."""
        return dict(zip(self.learners[0].trainable, self.ema.shadow_params, strict=True))

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return tensors by name, with sharding this process's shards, and the rest as JSON."""
        tensors: dict[str, dict[str, Tensor]] = {"ema": self.average}
        meta: dict[str, Any] = {"ema_step": self.ema.optimization_step, "skipped": self.skipped,
                                "evaluation": self.budget.state()}
        for learner in self.learners:
            learner_tensors, learner_meta = learner.pack()
            tensors |= learner_tensors
            meta |= learner_meta
        return tensors, meta

    def likes(self) -> dict[str, dict[str, Tensor]]:
        """Return tensors of the shape and in the shards of those that `pack` returns, by the same names; for a state of
        an optimizer, its parameter, by its number."""
        likes: dict[str, dict[str, Tensor]] = {"ema": self.average}
        for learner in self.learners:
            likes |= learner.likes()
        return likes

    def unpack(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Load what `pack` returned. RuntimeError, ValueError or KeyError if it belongs to another model."""
        for learner in self.learners:
            learner.unpack(tensors, meta)
        for name, shadow in self.average.items():
            shadow.copy_(to_shard(tensors["ema"][name], shadow))
        self.ema.optimization_step, self.skipped = meta["ema_step"], meta["skipped"]
        self.budget.load(meta["evaluation"])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[EvaluationGroup]:
        """Inside the block the model holds the EMA weights, in eval mode, and the average the model's. Nothing is
        compiled: samples have many shapes and would use up torch.compile's recompile limit, so that training would
        continue uncompiled. Afterwards memory is as before. All processes must enter.
        """
        joined = JoinedForward(self.model) if self.sharded else None
        self._swap()
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"), joined.active() if joined else contextlib.nullcontext():
                yield EvaluationGroup(joined.join if joined else lambda: None, self.together, self.budget)
        finally:
            self.model.train()
            self._swap()
            release_memory()

    def _swap(self) -> None:
        swap(self.learners[0].parameters, self.ema.shadow_params)

    def finish(self) -> None:
        """Load the EMA weights into the caller's model, in every process, and give it back to the objective, as it was.
        With sharding it stays on the CPU."""
        disable_context_parallel(self.model)
        if self.sharded:
            self._fill_full_model()
            self.objective.model = self.full_model
        else:
            self.ema.copy_to(self.learners[0].parameters)

    @torch.no_grad()
    def _fill_full_model(self) -> None:
        """Gather the average and the buffers into the caller's model."""
        parameters, buffers = dict(self.full_model.named_parameters()), dict(self.full_model.named_buffers())
        for name, shadow in self.average.items():
            parameters[name].copy_(full_tensor(shadow))
        for name, buffer in self.model.named_buffers():
            buffers[name].copy_(buffer)


def release_memory() -> None:
    """Free what an evaluation left: reference cycles, and cached blocks in the shapes of samples, between which the
    next step's tensors would not fit."""
    gc.collect()
    empty_cache()
