"""Checkpoints of a sharded training, by torch.distributed.checkpoint in safetensors files.

Each process writes its shards, in the background and from a copy, to one file; of tensors that several hold, one does.
Each reads the parts that its own shards need, so the number of processes may change. torch's own metadata file would be
a pickle; its safetensors files hold their offsets themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, async_save, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..utils.errors import UserError
from .checkpoints import commit_checkpoint, temporary_checkpoint
from .distributed import PATIENCE, gather, is_main_process, wait_for_all

Tensors = Mapping[str, Mapping[str, Tensor]]


class ShardedCheckpointWriter:
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


def load_shards(path: Path, groups: Collection[str], likes: Tensors) -> dict[str, dict[str, Tensor]]:
    """Load groups of tensors of a sharded checkpoint: shards where `likes` has a shard of that name and shape (see
    `State.likes`), else full ones. Needs no communication. Any exception if a file cannot be read."""
    reader = HuggingFaceStorageReader(str(path))
    tensors: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        if key.split("/", 1)[0] in groups:
            tensors[key] = _empty_like(_like(key, likes), stored.size, stored.properties.dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it loads without communication
        load(tensors, storage_reader=reader, no_dist=True)
    loaded: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for key, tensor in tensors.items():
        group, name = key.split("/", 1)
        loaded[group][name] = tensor
    return loaded


def _like(key: str, likes: Tensors) -> Tensor | None:
    group, name = key.split("/", 1)
    if "optimizer" in group:  # state.NUMBER.exp_avg
        name = name.split(".")[1]
    return likes.get(group, {}).get(name)


def _empty_like(like: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    if isinstance(like, DTensor) and like.shape == size:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)
