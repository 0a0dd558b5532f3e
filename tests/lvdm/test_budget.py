"""A training's steps follow from the seconds that it may take, by a trial."""

from __future__ import annotations

import json

import pytest

from lvdm.demo.demo import run_demo
from lvdm.training.budget import steps_that_fit
from odvae.utils.errors import UserError


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


@pytest.mark.parametrize(("seconds", "runs", "steps", "why"), [
    (70, 1, 90, "of 300, what fits into 70 s"),  # 60 s are left, 15 for five evaluations of (10 - 8 * 0.5) / 2 = 3 s
    (130, 2, 90, "of 300, what fits into 130 s"),  # and so for each of two runs
    (400, 1, 300, "all of 300 fit into 400 s"),
    (12, 1, 20, "the least, which does not fit into 12 s"),
    (-50, 1, 20, "the least, which does not fit into 0 s")])
def test_steps_that_fit(trial, seconds, runs, steps, why):
    budget = steps_that_fit(seconds, trial, evaluations=5, most=300, runs=runs)
    assert str(budget) == f"{steps} steps ({why} at 0.50 s a step)"


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_demo_of_no_length_is_refused_before_anything_is_made(minutes, tmp_path):
    with pytest.raises(UserError, match="--minutes must be above 0"):
        run_demo({}, tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()
