"""What a training changes from step to step, and its way into a checkpoint and back: weights, optimizers, EMA."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .checkpoints import flatten_optimizer, latest_checkpoint, load_checkpoint, save_checkpoint, unflatten_optimizer
from .errors import UserError
from .optim import OptimizerConfig, learning_rate, make_optimizers, set_learning_rate

logger = logging.getLogger("odvae")


class Learner:
    """A network with its optimizers, which go by `settings` from step `begins` on; `prefix` names it in checkpoints."""

    def __init__(self, model: nn.Module, settings: OptimizerConfig, *, not_hidden: str, prefix: str = "",
                 begins: int = 0) -> None:
        self.model, self.settings, self.prefix, self.begins = model, settings, prefix, begins
        self.parameters = list(model.parameters())
        self.optimizers = make_optimizers(model, settings, not_hidden=not_hidden)

    def set_learning_rate(self, step: int, steps: int, scale: float) -> None:
        value = learning_rate(max(0, step - self.begins), steps - self.begins, self.settings)
        set_learning_rate(self.optimizers, scale * value)

    def clip(self, accelerator: Accelerator) -> float:
        """Clip the gradient; returns its norm before, not finite where any part of it is not."""
        return float(accelerator.clip_grad_norm_(self.parameters, self.settings.clip))

    def step(self, *, apply: bool) -> None:
        """Apply the gradient, or drop it."""
        for optimizer in self.optimizers:
            if apply:
                optimizer.step()
            optimizer.zero_grad()

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        tensors: dict[str, dict[str, Tensor]] = {f"{self.prefix}model": dict(self.model.state_dict())}
        meta = {}
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            tensors[name], meta[name] = flatten_optimizer(optimizer.state_dict())
        return tensors, meta

    def unpack(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        """Raises RuntimeError or KeyError where the checkpoint is of another network."""
        self.model.load_state_dict(tensors[f"{self.prefix}model"])
        for i, optimizer in enumerate(self.optimizers):
            name = f"{self.prefix}optimizer{i}"
            optimizer.load_state_dict(unflatten_optimizer(tensors[name], meta[name]))


class State:
    """The learners (the model's first), the model's EMA, and how many steps in a row were skipped."""

    def __init__(self, learners: list[Learner], ema_decay: float) -> None:
        self.learners = learners
        self.model = learners[0].model
        self.ema = EMAModel(self.model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75)
        self.skipped = 0

    def save(self, run: Path, step: int, sums: dict[str, list[float]], keep: int, protect: Collection[int]) -> None:
        tensors: dict[str, dict[str, Tensor]] = {"ema": {str(i): p for i, p in enumerate(self.ema.shadow_params)}}
        meta: dict[str, Any] = {"ema_step": self.ema.optimization_step, "log": sums, "skipped": self.skipped}
        for learner in self.learners:
            more_tensors, more_meta = learner.pack()
            tensors |= more_tensors
            meta |= more_meta
        save_checkpoint(run / "checkpoints", step, tensors, meta, keep, protect)

    def restore(self, run: Path) -> tuple[int, dict[str, list[float]]]:
        """Load the newest checkpoint where there is one; returns the step to go on from and the log's open interval."""
        newest = latest_checkpoint(run / "checkpoints")
        if newest is None:
            return 0, {}
        tensors, meta = load_checkpoint(newest)
        try:
            for learner in self.learners:
                learner.unpack(tensors, meta)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{newest} is of another model ({str(error).splitlines()[-1].strip()}); remove {run}, or "
                            f"choose another output") from error
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors["ema"][str(i)])
        self.ema.optimization_step = meta["ema_step"]
        self.skipped = meta.get("skipped", 0)  # checkpoints from before steps could be skipped
        logger.info("going on from %s", newest)
        return int(meta["step"]), meta["log"]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model holds the EMA weights inside the block and is in eval mode; and nothing is compiled: samples have
        many shapes and would use up torch.compile's limit of shapes, so that training would go on uncompiled."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.model.train()
            self.ema.restore(self.model.parameters())
