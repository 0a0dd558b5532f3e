"""In which shard each caption's embedding is: sorted files that readers map, instead of reading the rows of all shards.

    text/FINGERPRINT/lookup.json         the shards that it covers, the folder of its bins and their sizes
    text/FINGERPRINT/lookup-DIGEST/      bins by a caption's hash: keys in order, and the number of each one's shard

It only saves time and memory: the rows of shards that it does not cover are read, without it those of all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..data.failures import cache_file_error
from ..utils.errors import UserError
from ..utils.storage import LocalStorage, Storage
from .hashes import BINS, Bin, SortedBins
from .shard_cache import CachedFile, shard_cache

LOOKUP, PREFIX = "lookup.json", "lookup-"
BIN = 2**18  # captions in a bin, until there are `BINS`
SCHEMA = pa.schema([("key", pa.uint64()), ("shard", pa.int32())])


class TextShard(NamedTuple):
    """A shard that a lookup covers."""

    name: str
    bytes: int  # of its tensors
    captions: int


class TextLookup(SortedBins):
    """The lookup of a store; empty if it has none. A bin is mapped on first use, of an object store after it was copied
    to this machine.

    Attributes:
        shards: the shards, by their number.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        content = _read(storage)
        self._folder: str = content["folder"]
        self._sizes: list[int] = content["bins"]
        self.shards = [TextShard(*shard) for shard in content["shards"]]
        self.num_bins = max(1, len(self._sizes))
        self._mapped: dict[int, tuple[Bin, CachedFile | None]] = {}

    def bin(self, k: int) -> Bin:
        if not self._sizes:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32)
        if k not in self._mapped:
            self._mapped[k] = self._map(f"{self._folder}/{k:03d}.arrow", self._sizes[k])
        return self._mapped[k][0]

    def _map(self, name: str, size: int) -> tuple[Bin, CachedFile | None]:
        try:
            file = None if isinstance(self._storage, LocalStorage) else shard_cache().fetch(self._storage, name, size)
            path = self._storage.path(name) if file is None else file.path
            with open(path, "rb") as opened:
                if opened.seek(0, 2) != size:
                    raise ValueError("it was truncated or changed")
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
            return (table["key"].to_numpy(), table["shard"].to_numpy()), file
        except FileNotFoundError as error:
            raise UserError(f"{self._storage.path(name)} was removed while the cache was open; start again. If it stays"
                            f" missing, delete {self._storage.path(LOOKUP)}") from error
        except (pa.ArrowException, ValueError, OSError) as error:
            raise _damage(self._storage, name, error) from error


def write_lookup(storage: Storage, shards: Sequence[TextShard], maps: Iterable[tuple[SortedBins, np.ndarray]]) -> None:
    """Write the lookup of a store, in place of the one it has. Readers that have opened that go on with it.

    Args:
        shards: all that it covers.
        maps: maps of keys, each with the new numbers of its numbers; -1: gone.
    """
    maps, captions = list(maps), sum(shard.captions for shard in shards)
    count = min(BINS, 1 << max(0, captions // BIN).bit_length())
    folder = PREFIX + hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
    old, sizes = _read(storage)["folder"], list[int]()
    for k in range(count):
        parts = [(keys, new_numbers[numbers]) for some, new_numbers in maps
                 for keys, numbers in [some.rebinned(k, count)] if len(keys)]
        keys, numbers = (np.concatenate([np.zeros(0, dtype), *(part[i] for part in parts)])
                         for i, dtype in enumerate((np.uint64, np.int32)))
        kept = np.flatnonzero(numbers >= 0)
        order = kept[np.argsort(keys[kept], kind="stable")]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(pa.record_batch([pa.array(keys[order]), pa.array(numbers[order])], schema=SCHEMA))
        data = memoryview(sink.getvalue())
        storage.write(f"{folder}/{k:03d}.arrow", data)
        sizes.append(len(data))
    storage.write(LOOKUP, json.dumps({"folder": folder, "bins": sizes, "shards": shards}).encode())
    for name in storage.folders(""):
        if name.startswith(PREFIX) and name not in (folder, old):
            storage.delete(name)


def _read(storage: Storage) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(storage.read(LOOKUP))
        return {key: content[key] for key in ("folder", "bins", "shards")}
    except FileNotFoundError:
        return {"folder": "", "bins": [], "shards": []}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damage(storage, LOOKUP, error) from error


def _damage(storage: Storage, name: str, error: Exception) -> UserError:
    return cache_file_error(error, storage.path(name), f"delete {storage.path(LOOKUP)}: it is written again when "
                            "captions are embedded")
