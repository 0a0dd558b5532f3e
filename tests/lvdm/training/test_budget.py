"""The steps of a training follow from its time budget, by a trial."""

from __future__ import annotations

import json

import pytest

from lvdm.demo.demo import run_demo
from lvdm.training.budget import steps_that_fit
from odvae.utils.errors import UserError


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """8 steps of 0.5 s, the first two slower; with two evaluations they take 10 s in all."""
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))

    def run(steps):
        seconds = [2.0, 1.0, *[0.5] * (steps - 2)]
        (tmp_path / "speed.jsonl").write_text("".join(json.dumps({"steps_per_second": 1 / s}) + "\n" for s in seconds))
        return tmp_path

    return run


@pytest.mark.parametrize(("seconds", "runs", "steps", "reason"), [
    (70, 1, 90, "of 300, as many as fit 70 s"),  # 60 s are left, 15 for five evaluations of (10 - 8 * 0.5) / 2 = 3 s
    (130, 2, 90, "of 300, as many as fit 130 s"),  # and so for each of two runs
    (400, 1, 300, "all of 300 fit 400 s"),
    (12, 1, 20, "the minimum, which does not fit 12 s"),
    (-50, 1, 20, "the minimum, which does not fit 0 s")])
def test_steps_that_fit(trial, seconds, runs, steps, reason):
    budget = steps_that_fit(seconds, trial, evaluations=5, most=300, runs=runs)
    assert str(budget) == f"{steps} steps ({reason} at 0.50 s per step)"


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 0.0, -1.0])
def test_invalid_minutes_of_a_demo_are_refused_at_once(minutes, tmp_path):
    with pytest.raises(UserError, match="--minutes must be above 0"):
        run_demo({}, tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()
