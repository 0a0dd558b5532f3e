"""A tiny training whose samples depend only on their indices; as a script, several of them in each process.

    python tests/tiny_training.py '{"outputs/one": {"micro_batch_size": 4}, "outputs/two": {"micro_batch_size": 2}}'
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lvdm.model.transformer import LVDMTransformer3DModel
from odvae.trainer import checkpoint_manager, checkpoints
from odvae.trainer.distributed import TIMEOUT, is_main_process, shutdown, wait_for_all
from odvae.trainer.evaluation import EvaluationGroup
from odvae.trainer.trainer import LoopConfig, Objective, fit
from odvae.utils.errors import UserError
from odvae.utils.seeding import generator

LOOP = {"steps": 10, "micro_batch_size": 4, "log_every": 1, "evaluate_every": 5, "save_every": 5, "keep": 9,
        "optimizer": {"learning_rate": 1e-3, "warmup": 2, "clip": 0.1}}


@dataclass(frozen=True)
class Samples:
    clean: Tensor  # (B, 4, 3, 4, 4)
    noise: Tensor
    timestep: Tensor  # (B, 3)
    names: tuple[str, ...]

    @property
    def frames(self) -> int:
        return self.clean.shape[0] * self.clean.shape[2]


def samples(step: int, numbers: range, poisoned: bool = False) -> Samples:
    def draw(name: str, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator(0, name, step, number)) for number in numbers])

    clean = draw("clean", 4, 3, 4, 4) * (float("nan") if poisoned else 1)
    return Samples(clean, draw("noise", 4, 3, 4, 4), draw("timestep", 3).sigmoid(), tuple(map(str, numbers)))


class Flow(Objective):
    non_muon_pattern = "embed|adaln|norm|project_out"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Samples, step: int, micro_batch: int) -> dict[str, Tensor]:
        t = batch.timestep[:, None, :, None, None]
        kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in self.model.parameters())
        predicted = self.model((1 - t) * batch.clean + t * batch.noise, batch.timestep).sample
        loss = (predicted.float() - batch.noise + batch.clean).square().mean()
        return {"loss": loss, "kept": torch.tensor(float(kept))}  # of the parameters, by this process

    def tokens(self, batch: Samples) -> int:
        return batch.frames * 4

    def flops(self, batch: Samples) -> int:
        return LVDMTransformer3DModel.flops(self.model, len(batch.clean), *batch.clean.shape[2:])


def tiny_model(*, frozen: bool = False, heads: int = 5) -> LVDMTransformer3DModel:
    """A model of odd widths, which no number of processes divides; `frozen`: except its attention's output."""
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(hidden_size=6 * heads, num_layers=2, num_attention_heads=heads, text_dim=0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(not frozen or "attention.to_out" in name)
    return model


def training(output: Path, settings: dict[str, Any], model: nn.Module | None = None,
             evaluate: Callable[[Objective], dict[str, float]] | None = None,
             objective_of: Callable[[nn.Module], Objective] = Flow) -> list[dict[str, float]]:
    """`fit` with `LOOP` and `settings`. Of these, "frozen" freezes most of the model, "heads" sets its size, "poison"
    names a batch, "unreadable" is the rank of a process and the step of a checkpoint that it cannot read, "slow" are
    seconds that the evaluation takes in the main process, beyond the timeout, and "error" is a part of the UserError
    that is expected.
    """
    settings = dict(settings)
    frozen, poison, unreadable, slow, expected_error = (
        settings.pop(name, None) for name in ("frozen", "poison", "unreadable", "slow", "error"))
    heads = settings.pop("heads", 5)
    make_unreadable(*unreadable or (None, None))
    loop = LoopConfig.model_validate(LOOP | settings | {"optimizer": LOOP["optimizer"] | settings.get("optimizer", {})})
    AcceleratorState._reset_state()  # another precision than the training before
    objective = objective_of(tiny_model(frozen=bool(frozen), heads=heads) if model is None else model)

    def get_batch(step: int, micro_batch: int, _: int) -> Samples:
        first = micro_batch * loop.micro_batch_size
        return samples(step, range(first, first + loop.micro_batch_size), [step, micro_batch] == poison)

    @torch.no_grad()
    def held_out(step: int, group: EvaluationGroup) -> dict[str, float]:
        assert not objective.model.training
        with slow_part(slow) if slow and step == loop.steps else contextlib.nullcontext():
            group.gather({PartialState().process_index: None})
        losses = {i: float(objective(samples(-1, range(i, i + 1)), 0, 0)["loss"]) for i in group.share(5)}
        metrics = {"held_out": sum(group.gather(losses)) / 5}
        return metrics | (evaluate(objective) if evaluate else {})

    output.mkdir(parents=True, exist_ok=True)
    try:
        log = fit(output, loop, objective, get_batch, held_out)
    except UserError as error:
        assert expected_error and expected_error in str(error), error
        return []
    assert not expected_error
    metrics = held_out(-1, EvaluationGroup()) if objective.model.eval() else {}
    shards_in_bf16 = loop.sharding != "none" and loop.mixed_precision == "bf16"
    tolerance = 1e-2 if shards_in_bf16 else 1e-6 if loop.context_parallel > 1 else 0
    expected = log[-1].get("held_out", metrics["held_out"])
    assert abs(metrics["held_out"] - expected) <= tolerance * expected  # the model holds the EMA weights
    return log


def make_unreadable(rank: int | None, step: int | None) -> None:
    """Let the process of this rank fail to read the checkpoint of a step, others not."""
    def load(path: Path, *args: Any) -> Any:
        if PartialState().process_index == rank and checkpoints.checkpoint_step(path) == step:
            raise UserError("a disk error")
        return checkpoints.load_checkpoint(path, *args)

    checkpoint_manager.load_checkpoint = load  # type: ignore[attr-defined]


@contextlib.contextmanager
def slow_part(seconds: float) -> Iterator[None]:
    """Take longer in the main process than the timeout of a step's collectives, which is half of that in the block."""
    distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds / 2))  # type: ignore[attr-defined]
    if PartialState().is_main_process:
        time.sleep(seconds)
    yield
    distributed.distributed_c10d._set_pg_timeout(TIMEOUT)  # type: ignore[attr-defined]


def copy_interrupted(source: Path, target: Path, step: int) -> None:
    """Copy a run as if it had been killed before it saved the checkpoint of `step`. All processes must call this."""
    if is_main_process():
        shutil.copytree(source, target)
        shutil.rmtree(checkpoints.checkpoint_path(target / "checkpoints", step))
    wait_for_all()


if __name__ == "__main__":
    for folder, settings in json.loads(sys.argv[1]).items():
        if source := settings.pop("resumes", None):
            copy_interrupted(Path(source), Path(folder), settings.get("steps", LOOP["steps"]))
        training(Path(folder), settings)
    shutdown()
