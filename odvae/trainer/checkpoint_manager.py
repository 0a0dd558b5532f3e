"""Save and restore the checkpoints of a run, and remove old ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..utils.errors import UserError
from ..utils.files import remove_temporaries
from .checkpoints import (
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    set_aside_after,
)
from .config import LoopConfig
from .distributed import gather, wait_for_all
from .metrics import MetricsLogger
from .shard_writer import ShardWriter
from .state import State

logger = logging.getLogger("odvae")


class CheckpointManager:
    """Save and restore the state of a run; keep the newest `loop.keep` checkpoints, and the best by `loop.keep_best`.
    All processes must call every method."""

    def __init__(self, run: Path, loop: LoopConfig, state: State, accelerator: Accelerator) -> None:
        self.run, self.loop, self.state, self.accelerator = run, loop, state, accelerator
        self.folder = run / "checkpoints"
        self._writer = ShardWriter() if state.sharded else None
        # Per step.
        replicas = accelerator.num_processes // loop.context_parallel
        self.samples = loop.micro_batch_size * loop.gradient_accumulation_steps * replicas

    def restore(self) -> dict[str, Any]:
        """Load the newest checkpoint that all processes can read; returns its "step" and the log's sums, or an empty
        dict if there is none.

        Raises:
            UserError: there are some but all are broken; it is of another model, or of another number of samples per
                step.
        """
        saved = self._load_newest()
        if saved.get("samples", self.samples) != self.samples:
            raise UserError(
                f"the run in {self.run} trained on {saved['samples']} samples per step, but loop.micro_batch_size x "
                f"loop.gradient_accumulation_steps x processes is now {self.samples}; make it {saved['samples']} "
                f"again, or choose another output")
        wait_for_all()  # from here on only one process writes
        if self.accelerator.is_main_process:
            remove_temporaries(self.run)
            for path in set_aside_after(self.folder, saved.get("step", 0)):
                logger.warning("%s was not resumed from, and its steps are computed again; you may remove it", path)
        return saved

    def _load_newest(self) -> dict[str, Any]:
        """A file system may show a checkpoint to some processes later than to others, or fail to read it in one."""
        seen = [set(steps) for steps in gather([checkpoint_step(path) for path in complete_checkpoints(self.folder)])]
        for step in sorted(set.union(*seen), reverse=True):
            path = checkpoint_path(self.folder, step)
            problems = [f"process {rank} does not find it" for rank, steps in enumerate(seen) if step not in steps]
            problem, tensors, saved = None, dict[str, Any](), dict[str, Any]()
            if not problems:
                try:
                    tensors, saved = load_checkpoint(path, self.state.likes() if self.state.sharded else None)
                except UserError as error:
                    problem = str(error)
                problems = [f"in process {rank}: {text}" for rank, text in enumerate(gather(problem)) if text]
            if not problems:
                self._unpack(path, tensors, saved)
                return saved
            logger.warning("not resuming from %s: %s", path, "; ".join(problems))
        if any(seen):
            raise UserError(f"no checkpoint in {self.folder} can be read by all processes, see the warnings above. All "
                            f"need the same folder; to start over, remove it")
        return {}

    def _unpack(self, path: Path, tensors: dict[str, Any], saved: dict[str, Any]) -> None:
        try:
            self.state.unpack(tensors, saved)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UserError(f"{path} belongs to another model ({str(error).splitlines()[-1].strip()}); remove "
                            f"{self.run}, or choose another output") from error
        logger.info("resuming from %s", path)

    def save(self, step: int, log: MetricsLogger) -> None:
        """Write a checkpoint, then remove those that are not kept. One of shards is written in the background."""
        best = self.best_step(log)
        protect = () if best is None else (best,)
        if self._writer is not None:
            tensors, meta = self.state.pack()
            self._writer.save(checkpoint_path(self.folder, step), step, tensors, self._meta(log) | meta,
                              lambda: remove_old_checkpoints(self.folder, step, self.loop.keep, protect))
            return
        if self.accelerator.is_main_process:
            tensors, meta = self.state.pack()
            save_checkpoint(self.folder, step, tensors, self._meta(log) | meta, self.loop.keep, protect)
        wait_for_all()

    def _meta(self, log: MetricsLogger) -> dict[str, Any]:
        return {"log": log.sums, "samples": self.samples}

    def close(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._writer is not None:
            self._writer.wait()

    def best_step(self, log: MetricsLogger) -> int | None:
        """Return the step with the best evaluation so far by `loop.keep_best`, or None."""
        return log.best_step(self.loop.keep_best, self.loop.best_is) if self.loop.keep_best else None
