"""A training's steps follow from the seconds that it may take, by a trial."""

from __future__ import annotations

import json

import pytest

from lvdm.budget import steps_that_fit


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """8 steps of 0.5 s, the first two slower; they and two evaluations take 10 s in all."""
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))

    def run(steps):
        seconds = [2.0, 1.0, *[0.5] * (steps - 2)]
        (tmp_path / "speed.jsonl").write_text("".join(json.dumps({"steps_per_second": 1 / s}) + "\n" for s in seconds))
        return tmp_path

    return run


@pytest.mark.parametrize(("seconds", "runs", "steps"), [
    (70, 1, 90),    # 60 s are left, 15 of them for five evaluations of (10 - 8 * 0.5) / 2 = 3 s
    (130, 2, 90),   # and so for each of two runs
    (400, 1, 300),  # all, on a fast machine
    (12, 1, 20)])   # and the least, on one that is too slow
def test_steps_that_fit(trial, seconds, runs, steps):
    budget = steps_that_fit(seconds, trial, evaluations=5, most=300, runs=runs)
    assert (budget.steps, budget.step_seconds) == (steps, 0.5)
    assert str(budget).startswith(f"{steps} steps ({'all 300 fit into' if steps == 300 else 'of 300, what fits into'} ")
