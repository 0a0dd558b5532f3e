"""How many steps of a training fit a time: measured by a short trial beforehand, so that the training itself has a
fixed length and can be repeated and resumed exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

TRIAL_STEPS = 8
WARM_UP = 2  # of them, not counted


@dataclass(frozen=True)
class StepBudget:
    """The length of a training, and the reason."""

    steps: int
    least: int  # however slow the machine is
    most: int  # however fast
    step_seconds: float
    seconds: float  # for all runs of the training, the trial included

    def __str__(self) -> str:
        reason = {self.most: f"all of {self.most} fit", self.least: "the minimum, which does not fit"}.get(
            self.steps, f"of {self.most}, as many as fit")
        return f"{self.steps} steps ({reason} {max(0.0, self.seconds):.0f} s at {self.step_seconds:.2f} s per step)"


def steps_that_fit(seconds: float, trial: Callable[[int], Path], *, evaluations: int, most: int, least: int = 20,
                   runs: int = 1) -> StepBudget:
    """Time a trial and plan `runs` trainings of equal length for what it leaves of `seconds`.

    Args:
        trial: trains the given number of steps, evaluating before the first and after the last; returns the run's
            folder, whose log has a line per step.
        evaluations: per run, including the one before the first step.
        least: minimum of steps, even if they do not fit.
    """
    began = time.monotonic()
    run = trial(TRIAL_STEPS)
    spent = time.monotonic() - began
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    step = 1 / median(line["steps_per_second"] for line in lines[WARM_UP:])
    evaluation = max(0.0, spent - TRIAL_STEPS * step) / 2  # includes half of the time for loading and saving
    fitting = int(((seconds - spent) / runs - evaluations * evaluation) / step)
    return StepBudget(min(most, max(least, fitting)), least, most, step, seconds)
