"""What a demo has done so far: its commands, their times and results, and the time that is left."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from odvae.cli import print_result
from odvae.utils.errors import UserError

from ..training.budget import StepBudget, steps_that_fit


@dataclass
class DemoSession:
    """Runs the commands of a demo and records what becomes its report.json."""

    out: Path
    programs: Mapping[str, Callable[[list[str]], int]]  # the command lines `odvae` and `lvdm`
    minutes: float  # for the whole demo
    videos: Path | None  # the user's own folder; None: rendered clips
    began: float = field(default_factory=time.monotonic)
    generation_seconds: float = 0.0  # reserved for stages 5 and 6
    prompt_share: float = 1.0  # share of the prompts of stage 6 that fit
    budgets: dict[str, StepBudget] = field(default_factory=dict)  # of the live trainings
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    figures: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Print the title, and afterwards the time taken."""
        print_result(f"\n== {title}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print_result(f"   {self.seconds[name]:.0f} s")

    @property
    def training_seconds(self) -> float:
        """Seconds that remain for trainings."""
        return 60 * self.minutes - (time.monotonic() - self.began) - self.generation_seconds

    def fit_steps(self, name: str, seconds: float, program: str, arguments: Sequence[str], **options: int) -> int:
        """Measure a trial of the training with these arguments; return the number of steps that fit `seconds`, see
        `steps_that_fit`."""
        def trial(steps: int) -> Path:
            folder = empty_folder(self.out / "trial")
            self.command(program, "train", f"output={folder}", *arguments, f"loop.steps={steps}", "loop.log_every=1",
                         f"loop.evaluate_every={steps}", record=False)
            return folder

        print_result("A short trial, to see how many steps fit:")
        self.budgets[name] = steps_that_fit(seconds, trial, **options)
        empty_folder(self.out / "trial")
        print_result(f"   {self.budgets[name]}")
        return self.budgets[name].steps

    def command(self, program: str, *arguments: object, record: bool = True) -> None:
        """Run `odvae ...` or `lvdm ...` in this process, and print and record it as typed in a shell."""
        words = [str(argument) for argument in arguments]
        line = " ".join([program, *(json.dumps(word) if " " in word else word for word in words)])
        if record:
            self.commands.append(line)
        print_result(f"$ {line}")
        status = self.programs[program](words)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"the demo failed at: {line}")


def empty_folder(folder: Path) -> Path:
    """Remove what an earlier demo left: trainings and the cache would be resumed, or refused where they differ."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a training's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
