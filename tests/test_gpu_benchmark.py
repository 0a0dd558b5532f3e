"""`make gpu` at the small sizes of a CPU, so that it works when somebody has a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRAINS = "training"  # in processes of its own


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    yield gpu
    for name in [name for name, module in sys.modules.items()
                 if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS))]:
        del sys.modules[name]


@pytest.mark.parametrize("parts", ["others", pytest.param(TRAINS, marks=pytest.mark.slow)])
def test_every_part_runs_and_its_checks_pass(gpu, parts):
    chosen = [part for part in gpu.PARTS if (part.name == TRAINS) == (parts == TRAINS)]
    results = []
    assert gpu.run(chosen, torch.device("cpu"), 60, lambda part, result: results.append((part.name, result))) == []
    assert {name for name, _ in results} == {part.name for part in chosen}
    assert not [f"{name}: {result}" for name, result in results if result.ok is False]


def test_an_error_and_a_full_clock_are_results(gpu):
    def fail(device):
        yield gpu.Result("before", 1.0, limit=0.5)
        raise RuntimeError("no kernel")

    results = []
    broken = gpu.Part("broken", fail)
    assert gpu.run([broken], torch.device("cpu"), 1, lambda part, result: results.append(result)) == []
    assert [(result.what, result.ok) for result in results] == [
        ("before", False), ("broken: RuntimeError: no kernel", False)]
    assert gpu.run([broken, broken], torch.device("cpu"), -1, print) == ["broken", "broken"]
