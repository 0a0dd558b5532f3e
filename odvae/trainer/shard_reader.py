"""Read checkpoints of a sharded training, by torch.distributed.checkpoint: each process reads the parts that its own
shards need, so the number of processes may change."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

Tensors = Mapping[str, Mapping[str, Tensor]]


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
