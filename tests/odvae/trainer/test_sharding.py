"""Training with gradient accumulation, in several processes and in shards equals training in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_training
import torch
from processes import run_torchrun
from tiny_training import tiny_model, training

from odvae.trainer.checkpoints import load_checkpoint

# Many trainings in several processes: by `make soak`. CI has one of each kind in test_distributed.py.
pytestmark = [pytest.mark.xdist_group("sharding"), pytest.mark.slow]

FULL = {"micro_batch_size": 2, "sharding": "full"}


def read(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def checkpoint(run: Path, step: int = 10) -> dict[str, torch.Tensor]:
    tensors, _ = load_checkpoint(run / f"checkpoints/step-{step:08d}")
    return {f"{group}.{name}": tensor for group, part in sorted(tensors.items()) for name, tensor in part.items()}


def interrupt(source: Path, target: Path, **settings: object) -> dict[Path, dict[str, object]]:
    """A run that was killed after step 9, to resume with `settings`."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints/step-00000010")
    return {target: settings}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings by name: the first in this process, then in two."""
    folder = tmp_path_factory.mktemp("runs")
    training(folder / "one", {"micro_batch_size": 4})
    training(folder / "passes", {"micro_batch_size": 2, "gradient_accumulation_steps": 2})
    training(folder / "frozen", {"micro_batch_size": 4, "frozen": True})
    trainings = {
        folder / name: settings
        for name, settings in {
            "two": {"micro_batch_size": 2},
            "two passes": {"micro_batch_size": 1, "gradient_accumulation_steps": 2},
            "shards": FULL,
            "shards, passes": FULL | {"micro_batch_size": 1, "gradient_accumulation_steps": 2},
            "shards, recomputed": FULL | {"gradient_checkpointing": "full"},
            "shards, frozen": FULL | {"frozen": True},
            "shards, poison": FULL | {"poison": [3, 1]},
            "two, bf16": {"micro_batch_size": 2, "mixed_precision": "bf16"},
            "shards, bf16": FULL | {"mixed_precision": "bf16"},
            "shards, muon": FULL | {"optimizer": {"name": "muon"}, "error": "muon computes its steps from full"},
        }.items()
    }
    run_torchrun(tiny_training.__file__, json.dumps({str(path): settings for path, settings in trainings.items()}))
    trainings = (interrupt(folder / "shards", folder / "shards, cut", **FULL)
                 | interrupt(folder / "one", folder / "one, cut", **FULL)
                 | interrupt(folder / "two", folder / "two, fewer", micro_batch_size=1,
                             error="trained on 4 samples per step"))
    run_torchrun(tiny_training.__file__, json.dumps({str(path): settings for path, settings in trainings.items()}))
    return folder


@pytest.mark.parametrize("other", ["passes", "two", "two passes", "shards", "shards, passes", "shards, recomputed"])
def test_losses_are_those_of_one_process_with_the_whole_batch(runs, other):
    assert len(read(runs / "one")) == 10 and read(runs / "one")[-1] < read(runs / "one")[0]
    assert read(runs / other) == pytest.approx(read(runs / "one"), rel=1e-6)  # float32 has 7 digits
    assert read(runs / other, "grad_norm") == pytest.approx(read(runs / "one", "grad_norm"), rel=1e-4)
    assert min(read(runs / "one", "grad_norm")) > 0.1  # so it is clipped
    assert read(runs / other, "held_out") == pytest.approx(read(runs / "one", "held_out"), rel=1e-6)


def test_a_process_keeps_its_share(runs):
    """Means over both processes of what each keeps at the start of a step."""
    every = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert set(read(runs / "two", "kept")) == {every}
    for run in ("shards", "shards, passes", "shards, frozen", "shards, bf16"):
        assert set(read(runs / run, "kept")) == {every / 2}


def test_a_checkpoint_is_the_same_however_it_was_trained(runs):
    one, shards = checkpoint(runs / "one"), checkpoint(runs / "shards")
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in shards.items()}
    assert all(v.allclose(shards[k], atol=1e-4) for k, v in one.items())


def test_resumed_shards_are_uninterrupted_bit_for_bit(runs):
    whole, resumed = checkpoint(runs / "shards"), checkpoint(runs / "shards, cut")
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    assert (runs / "shards/metrics.jsonl").read_text() == (runs / "shards, cut/metrics.jsonl").read_text()


def test_a_run_resumes_with_and_without_shards(runs):
    assert read(runs / "one, cut") == pytest.approx(read(runs / "one"), rel=1e-6)
    assert read(runs / "one, cut")[:5] == read(runs / "one")[:5]
    for path, settings in interrupt(runs / "shards", runs / "shards, then one", micro_batch_size=4).items():
        training(path, settings)
        assert read(path)[:5] == read(runs / "shards")[:5]
        assert read(path) == pytest.approx(read(runs / "one"), rel=1e-6)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all_shards(runs):
    assert read(runs / "shards, poison", "skipped") == [step == 3 for step in range(10)]
    assert len(read(runs / "shards, poison")) == 9
    assert all(tensor.isfinite().all() for tensor in checkpoint(runs / "shards, poison").values())


def test_bf16_shards_learn_as_bf16_copies_do(runs):
    assert read(runs / "shards, bf16") == pytest.approx(read(runs / "two, bf16"), rel=5e-3)
    assert read(runs / "shards, bf16") != read(runs / "shards")
    assert all(v.dtype == torch.float32 for k, v in checkpoint(runs / "shards, bf16").items())


def test_a_frozen_base_is_in_no_checkpoint(runs):
    before, after = tiny_model().state_dict(), checkpoint(runs / "frozen")
    trained = [name for name in before if "attention.to_out" in name]
    assert {k for k in after if k.startswith("model.")} == {f"model.{name}" for name in trained}
    assert len([k for k in after if k.startswith("ema.")]) == len(trained)
    assert all(not after[f"model.{name}"].equal(before[name]) for name in trained)
    assert read(runs / "shards, frozen") == pytest.approx(read(runs / "frozen"), rel=1e-6)
    assert checkpoint(runs / "shards, frozen").keys() == after.keys()
