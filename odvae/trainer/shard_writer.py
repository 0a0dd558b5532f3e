"""Write checkpoints of a sharded training, by torch.distributed.checkpoint in safetensors files.

Each process writes its shards, in the background and from a copy, to one file; of tensors that several hold, one does.
torch's own metadata file would be a pickle; its safetensors files hold their offsets themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from torch import Tensor, distributed
from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
from torch.distributed.checkpoint.api import CheckpointException

from ..utils.errors import UserError
from .checkpoints import commit_checkpoint, temporary_checkpoint
from .distributed import PATIENCE, gather, is_main_process, wait_for_all

Tensors = Mapping[str, Mapping[str, Tensor]]


class ShardWriter:
    """Writes one checkpoint at a time. All processes must call every method."""

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)  # used beside those of the steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, target: Path, step: int, tensors: Tensors, meta: dict[str, Any],
             finish: Callable[[], None]) -> None:
        """Copy the tensors and return; the checkpoint is written in the background. `finish` is then called in the main
        process. A complete checkpoint of this step is not written again.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        main = is_main_process()
        folder = gather(temporary_checkpoint(target) if main else None)[0]
        if folder is None:
            return
        named = {f"{group}/{name}": tensor.detach() for group, part in tensors.items() for name, tensor in part.items()}
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        saved = cast("Future[Any]", async_save(named, storage_writer=writer, process_group=self._group))

        def commit() -> None:
            saved.result()  # in all processes
            if main:
                commit_checkpoint(folder, target, step, meta, sorted(tensors), sharded=True)
                finish()

        self._pending = self._pool.submit(commit)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. Raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            causes = "; ".join(f"process {rank}: {cause[0]}" for rank, cause in error.failures.items())
            raise UserError(f"the checkpoint could not be written ({causes})") from error
        wait_for_all()  # for the main process, which renames it
