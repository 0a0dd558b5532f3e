"""Checkpoints of shards: any number of processes resumes from them, exactly, and from the newest that all can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_forked
from safetensors.torch import load_file
from tiny_training import copy_interrupted, tiny_model, training

from odvae.cli import main as odvae
from odvae.trainer.checkpoints import load_checkpoint

pytestmark = pytest.mark.xdist_group("sharded checkpoints")

SHORT = {"steps": 4, "evaluate_every": 2, "save_every": 2}
FULL, HYBRID = SHORT | {"sharding": "full"}, SHORT | {"sharding": "hybrid", "shard_size": 2}
CONTEXT = SHORT | {"context_parallel": 2, "micro_batch_size": 4, "heads": 4}


def read(run: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def newest(run: Path) -> dict[str, torch.Tensor]:
    tensors, _ = load_checkpoint(run / "checkpoints/step-00000004")
    return {f"{group}.{name}": tensor for group, part in tensors.items() for name, tensor in part.items()}


def fork(folder: Path, count: int, trainings: dict[str, dict[str, object]]) -> None:
    """Train in `count` processes, one run after the other."""
    settings = {str(folder / name): {"micro_batch_size": 4 // count} | setting for name, setting in trainings.items()}
    run_forked("tiny_training", json.dumps(settings), log=folder / f"log-{count}", count=count)


def assert_close(run: Path, expected: Path, tolerance: float) -> None:
    one, other = newest(expected), newest(run)
    assert one.keys() == other.keys() and all(other[k].allclose(v, atol=tolerance) for k, v in one.items())


def slow(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by name; "four, then one" was killed in four processes after step 3 and resumed in one. Those of the slow
    tests are made if these are selected."""
    folder = tmp_path_factory.mktemp("runs")
    resumes = {name: {"resumes": str(folder / name)} for name in ("one", "four", "hybrid")}
    training(folder / "one", SHORT)
    fork(folder, 4, {"four": FULL, "hybrid": HYBRID, "four, then four": FULL | resumes["four"]})
    shutil.copytree(folder / "four", folder / "unreadable, then two")
    two = {"one, then two": FULL | resumes["one"] | {"slow": 1.0}, "hybrid, then two": FULL | resumes["hybrid"],
           "unreadable, then two": FULL | {"unreadable": [1, 4]}, "context": CONTEXT,
           "context, shards": CONTEXT | {"sharding": "full"}}
    selected = {item.callspec.params.get("other") for item in request.session.items if hasattr(item, "callspec")}
    fork(folder, 2, {name: run for name, run in two.items() if name in selected | {"unreadable, then two"}})
    training(folder / "whole context", SHORT | {"heads": 4})
    copy_interrupted(folder / "four", folder / "four, then one", 4)
    training(folder / "four, then one", SHORT)
    return folder


@pytest.mark.parametrize("other", ["four", "hybrid", "one, then two", slow("hybrid, then two"),
                                   "unreadable, then two", "four, then one"])
def test_any_number_of_processes_trains_and_resumes_alike(runs, other):
    """With processes that evaluate unequal shares, and one that takes longer than the timeout of a step."""
    for key, tolerance in {"loss": 1e-6, "held_out": 1e-6, "grad_norm": 1e-4}.items():
        assert read(runs / other, key) == pytest.approx(read(runs / "one", key), rel=tolerance)


def test_resumed_shards_are_uninterrupted_bit_for_bit(runs):
    whole, resumed = newest(runs / "four"), newest(runs / "four, then four")
    assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)
    assert (runs / "four/metrics.jsonl").read_text() == (runs / "four, then four/metrics.jsonl").read_text()


def test_copies_of_shards_compute_what_full_sharding_does(runs):
    every = read(runs / "one", "kept")[0]
    assert set(read(runs / "four", "kept")) == {every / 4} and set(read(runs / "hybrid", "kept")) == {every / 2}
    assert_close(runs / "hybrid", runs / "four", 1e-5)


@pytest.mark.parametrize("other", ["context", slow("context, shards")])
def test_samples_whose_tokens_are_spread_over_processes_train_alike(runs, other):
    for key, tolerance in {"loss": 1e-6, "held_out": 1e-6, "grad_norm": 1e-4}.items():
        assert read(runs / other, key) == pytest.approx(read(runs / "whole context", key), rel=tolerance)
    assert_close(runs / other, runs / "whole context", 1e-4)


def test_processes_resume_from_the_newest_checkpoint_that_all_can_read(runs):
    run, log = runs / "unreadable, then two", (runs / "log-2").read_text()
    assert f"not resuming from {run}/checkpoints/step-00000004: in process 1: a disk error" in log
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004", "unread-0-step-00000004"]
    assert_close(run, runs / "four", 1e-5)


def test_shards_are_written_by_each_process_and_consolidated_by_a_command(runs, tmp_path, capsys):
    checkpoint = runs / "four/checkpoints/step-00000004"
    sizes = [path.stat().st_size for path in checkpoint.glob("shard-*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes)
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}  # no pickle
    assert odvae(["consolidate", str(checkpoint), str(tmp_path / "whole")]) == 0
    average = load_file(tmp_path / "whole/ema.safetensors")
    assert average.keys() == dict(tiny_model().named_parameters()).keys()
    whole, _ = load_checkpoint(tmp_path / "whole")
    assert all(whole[group][name].equal(v) for key, v in newest(runs / "four").items()
               for group, name in [key.split(".", 1)])
    (tmp_path / "broken").mkdir()
    shutil.copytree(checkpoint, tmp_path / "broken", dirs_exist_ok=True)
    next((tmp_path / "broken").glob("shard-*")).write_bytes(b"\0" * sizes[0])
    assert odvae(["consolidate", str(tmp_path / "broken"), str(tmp_path / "no")]) == 2
    assert "is broken" in capsys.readouterr().err
