"""When a training's checkpoints are written and read, and which of them are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..utils.errors import UserError
from ..utils.files import remove_temporaries
from .checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from .config import LoopConfig
from .metrics import MetricsLogger
from .state import State

logger = logging.getLogger("odvae")


class CheckpointManager:
    """Saves and restores the state of a run; keeps the newest `loop.keep` checkpoints, and the best by
    `loop.keep_best`. Every method is called in all processes at once; the main one alone writes."""

    def __init__(self, run: Path, loop: LoopConfig, state: State, accelerator: Accelerator) -> None:
        self.run, self.loop, self.state, self.accelerator = run, loop, state, accelerator
        self.folder = run / "checkpoints"
        self.samples = loop.micro_batch_size * loop.gradient_accumulation_steps * accelerator.num_processes  # a step

    def restore(self) -> dict[str, Any]:
        """Load the newest checkpoint; returns its "step" to resume from and the log's sums; empty where there is none.

        Raises:
            UserError: it is broken, of another model, or of another number of samples a step.
        """
        newest, saved = latest_checkpoint(self.folder), dict[str, Any]()
        if newest is not None:
            tensors, saved = load_checkpoint(newest)
            try:
                self.state.unpack(tensors, saved)
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(f"{newest} is of another model ({str(error).splitlines()[-1].strip()}); remove "
                                f"{self.run}, or choose another output") from error
            logger.info("resuming from %s", newest)
        if saved.get("samples", self.samples) != self.samples:
            raise UserError(
                f"the run in {self.run} trained on {saved['samples']} samples a step, and loop.micro_batch_size x "
                f"loop.gradient_accumulation_steps x processes is {self.samples} now; make it {saved['samples']} "
                f"again, or choose another output")
        self.accelerator.wait_for_everyone()  # from here on one process alone writes
        if self.accelerator.is_main_process:
            remove_temporaries(self.run)
        return saved

    def save(self, step: int, log: MetricsLogger) -> None:
        """Write a checkpoint, then remove those that are not kept."""
        main, best = self.accelerator.is_main_process, self.best_step(log)
        if main or self.state.sharded:  # whole tensors are put together by all processes
            tensors, meta = self.state.pack(keep=main)
            if main:
                save_checkpoint(self.folder, step, tensors, {"log": log.sums, "samples": self.samples} | meta,
                                self.loop.keep, protect=() if best is None else (best,))
        self.accelerator.wait_for_everyone()

    def best_step(self, log: MetricsLogger) -> int | None:
        """The step whose evaluation is the best so far by `loop.keep_best`; None where there is none."""
        return log.best_step(self.loop.keep_best, self.loop.best_is) if self.loop.keep_best else None
