"""Save and restore the checkpoints of a run, and remove old ones."""

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
    """Save and restore the state of a run; keep the newest `loop.keep` checkpoints, and the best by `loop.keep_best`.
    All processes must call every method; only the main one writes."""

    def __init__(self, run: Path, loop: LoopConfig, state: State, accelerator: Accelerator) -> None:
        self.run, self.loop, self.state, self.accelerator = run, loop, state, accelerator
        self.folder = run / "checkpoints"
        # Per step.
        self.samples = loop.micro_batch_size * loop.gradient_accumulation_steps * accelerator.num_processes

    def restore(self) -> dict[str, Any]:
        """Load the newest checkpoint; returns its "step" and the log's sums, or an empty dict if there is none.

        Raises:
            UserError: it is broken, of another model, or of another number of samples per step.
        """
        newest, saved = latest_checkpoint(self.folder), dict[str, Any]()
        if newest is not None:
            tensors, saved = load_checkpoint(newest)
            try:
                self.state.unpack(tensors, saved)
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(f"{newest} belongs to another model ({str(error).splitlines()[-1].strip()}); remove "
                                f"{self.run}, or choose another output") from error
            logger.info("resuming from %s", newest)
        if saved.get("samples", self.samples) != self.samples:
            raise UserError(
                f"the run in {self.run} trained on {saved['samples']} samples per step, but loop.micro_batch_size x "
                f"loop.gradient_accumulation_steps x processes is now {self.samples}; make it {saved['samples']} "
                f"again, or choose another output")
        self.accelerator.wait_for_everyone()  # from here on only one process writes
        if self.accelerator.is_main_process:
            remove_temporaries(self.run)
        return saved

    def save(self, step: int, log: MetricsLogger) -> None:
        """Write a checkpoint, then remove those that are not kept."""
        main, best = self.accelerator.is_main_process, self.best_step(log)
        if main or self.state.sharded:  # all processes must take part in gathering shards
            tensors, meta = self.state.pack(keep=main)
            if main:
                save_checkpoint(self.folder, step, tensors, {"log": log.sums, "samples": self.samples} | meta,
                                self.loop.keep, protect=() if best is None else (best,))
        self.accelerator.wait_for_everyone()

    def best_step(self, log: MetricsLogger) -> int | None:
        """Return the step with the best evaluation so far by `loop.keep_best`, or None."""
        return log.best_step(self.loop.keep_best, self.loop.best_is) if self.loop.keep_best else None
