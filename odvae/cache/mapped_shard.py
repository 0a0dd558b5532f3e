"""The tensors of shards: mapped files, and of a cache in an object store the few shards that are in use."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from .shard_cache import CachedFile, ShardCache

MAX_LOADED = 512  # shards; each has a file open


class MappedShard:
    """The tensors of one .safetensors file, in the order of `ids`, in a private mapping: writes do not reach the file,
    and no file descriptor stays open, however many shards there are."""

    def __init__(self, path: Path, ids: list[str], dtype: torch.dtype) -> None:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        size = path.stat().st_size
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        begin, self._layouts = 8 + length, []
        for name in ids:
            first, last = header[name]["data_offsets"]
            c, t, h, w = header[name]["shape"]
            if begin + last > size or header[name]["dtype"] != NAMES[dtype] or (begin + first) % dtype.itemsize:
                raise ValueError(f"the offset, size or dtype of {name} is wrong")
            self._layouts.append(((c, t, h, w), (t * h * w, h * w, w, 1), (begin + first) // dtype.itemsize))
        flat: Any = torch.empty(0, dtype=dtype)  # mypy knows less of `set_` than torch
        self._flat: Tensor = flat.set_(storage, 0, (size // dtype.itemsize,), (1,))

    def tensor(self, i: int) -> Tensor:
        return self._flat.as_strided(*self._layouts[i])


@dataclass(frozen=True)
class LoadedShard:
    """A shard that is on this machine, with what training needs of its rows."""

    tensors: MappedShard
    rows: pa.Table  # its IDs and captions
    file: CachedFile | None  # of a cache in an object store
    bytes: int


class LoadedShards:
    """The shards of a cache in an object store that this process has mapped, by their position in the cache. The least
    recently used are dropped, so that the shard cache can remove their files. For use in several threads.

    Args:
        load: returns the shard at a position.
        size: returns its size in bytes.
    """

    def __init__(self, load: Callable[[int], LoadedShard], size: Callable[[int], int], files: ShardCache) -> None:
        self._load, self._size, self._files = load, size, files
        self._loaded: OrderedDict[int, LoadedShard] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Lock] = {}
        files.users += 1

    def get(self, position: int) -> LoadedShard:
        """Return a shard; load it if it is not here, or wait for a thread that does."""
        with self._lock:
            if (found := self._loaded.get(position)) is not None:
                self._loaded.move_to_end(position)
                return found
            loading = self._loading.setdefault(position, threading.Lock())
        with loading:
            with self._lock:
                if (found := self._loaded.get(position)) is not None:
                    return found
                self._make_room(self._size(position))
            found = self._load(position)
            with self._lock:
                self._loaded[position] = found
                self._loading.pop(position, None)
        return found

    def _make_room(self, size: int) -> None:
        """Drop shards, so that the caches of this process map half of what the shard cache holds at most."""
        used = size + sum(shard.bytes for shard in self._loaded.values())
        while self._loaded and (used > self._files.limit / 2 / self._files.users or len(self._loaded) >= MAX_LOADED):
            used -= self._loaded.popitem(last=False)[1].bytes


NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
