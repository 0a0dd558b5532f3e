"""Evaluations keep to their budget and to the training's precision."""

from __future__ import annotations

import itertools

import torch
from tiny_training import training

from odvae.trainer import evaluation
from odvae.trainer.evaluation import EvaluationBudget, EvaluationGroup, evenly
from odvae.utils.precision import compute_precision


def test_the_first_evaluation_settles_what_fits_the_budget(monkeypatch, caplog):
    clock = itertools.count(step=30.0)  # an item takes half a minute
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    ran: list[int] = []

    def evaluate(budget: EvaluationBudget | None, count: int = 8) -> dict[int, int]:
        def run(items: list[int]) -> list[int]:
            ran.extend(items)
            return [10 * item for item in items]

        return EvaluationGroup(budget=budget).evaluate("clips", count, run, lambda n: evenly(n, count), 0.5)

    budget = EvaluationBudget(4.0)  # half of it for these
    expected = {0: 0, 2: 20, 4: 40, 6: 60}
    assert evaluate(budget) == expected and ran == [0, 1, 2, 4, 6]  # 0 and 1 were timed
    assert "evaluating 4 of 8 clips" in caplog.text
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: 1 / 0)  # from here on nothing is timed
    resumed = EvaluationBudget(4.0)
    resumed.load(budget.state())
    assert evaluate(budget) == evaluate(resumed) == expected
    assert evaluate(EvaluationBudget()) == evaluate(None) == {i: 10 * i for i in range(8)}
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    other = EvaluationBudget(0.1)
    other.load(budget.state())
    assert evaluate(other) == {0: 0}
    assert len(evaluate(budget, 2)) == 2  # another number is settled on its own


def test_it_computes_in_the_trainings_precision(tmp_path):
    half = compute_precision("bf16", "cpu") == "bf16"
    for precision, expected in ("bf16", half), ("no", False):  # last, as accelerate keeps it for tests to come
        log = training(tmp_path / precision, {"steps": 1, "mixed_precision": precision},
                       evaluate=lambda _: {"autocast": float(torch.is_autocast_enabled("cpu"))})
        assert [line["autocast"] for line in log if "autocast" in line] == [expected, expected]
