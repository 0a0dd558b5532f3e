"""Caption embeddings in a cache, as `embed` stores them.

    text/FINGERPRINT/encoder.json         the encoder's fingerprint, name and width
    text/FINGERPRINT/NAME.safetensors     one tensor (tokens, dim) per caption, named by the caption's hash
    text/FINGERPRINT/NAME.parquet         one row per caption; it commits the shard, as with latents
    text/FINGERPRINT/NUMBER/              more such shards, from the 1025th on
    text/FINGERPRINT/lookup.json          where each caption is, if there are many shards (`text_lookup`)
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.failures import cache_file_error
from ..utils.errors import UserError
from ..utils.storage import LocalStorage, Storage, open_storage
from ..utils.threads import map_ahead
from .format import caption_hash
from .hashes import HashMap, hash_keys
from .partition import READERS
from .shard_cache import CachedFile, shard_cache
from .text_lookup import TextLookup, TextShard, write_lookup

RECENT_SHARDS = 64  # from which on a lookup is written
ENCODER = "encoder.json"
OPEN_SHARDS, OPEN_REMOTE_SHARDS = 512, 64  # the last used; of a local cache, and of one in an object store
SCHEMA = pa.schema([("caption_hash", pa.string()), ("caption", pa.string()), ("tokens", pa.int32()),
                    ("checksum", pa.string())])


class TextEncoder(Protocol):
    """The interface of text encoders, as in `lvdm.text`, for the cache, training and the pipeline."""

    @property
    def dim(self) -> int:
        """Width of a token vector."""

    @property
    def fingerprint(self) -> str:
        """A hash that changes if the same caption gives other vectors."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> vectors (B, N, dim) float32 and mask (B, N) bool, N that of the longest; False is padding.
        Every row has a True, even that of ""."""


class TextStore:
    """A cache's embeddings by one encoder.

    Opening it lists the shards, and reads the rows of those that its lookup does not cover.

    Args:
        folder: text/FINGERPRINT in a cache: a path, a URL of fsspec, or their storage.

    Raises:
        UserError: no such store, or one that is damaged: shards are missing or truncated.
    """

    def __init__(self, folder: Storage | Path | str) -> None:
        self._storage = open_storage(folder)
        self.folder = Path(self._storage.root)  # of a local cache
        description = _read_description(self._storage)
        self.fingerprint: str = description["fingerprint"]
        self.name: str = description["name"]
        self.dim: int = description["dim"]
        self._open: OrderedDict[str, tuple[Any, CachedFile | None]] = OrderedDict()
        self._lookup = TextLookup(self._storage)
        listed = list_shards(self._storage)
        covered = self._lookup.shards
        for shard in covered:
            if shard.name in listed and listed[shard.name] != shard.bytes:
                raise _damaged(self._storage, shard.name)
        self._exists = np.array([shard.name in listed for shard in covered], bool)
        names = {shard.name for shard in covered}
        self._recent = [TextShard(name, size, captions=0) for name, size in listed.items() if name not in names]
        # A dict of a million captions takes 200 MB in each process; this 12.
        with ThreadPoolExecutor(READERS) as pool:
            self._recent_keys = HashMap(map_ahead(pool, self._read_keys, self._recent, 2 * READERS))

    def _read_keys(self, shard: TextShard) -> np.ndarray:
        return hash_keys(_read_hashes(self._storage, shard)["caption_hash"])

    def __len__(self) -> int:
        return len(self._recent_keys) + sum(
            shard.captions for shard, exists in zip(self._lookup.shards, self._exists, strict=True) if exists)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption_hash(caption)) is not None

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return a bool for each of some `hash_keys`: whether its caption is stored."""
        return np.asarray(self._shards_of(keys) >= 0)

    def _shards_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of each key's shard, first those of the lookup; -1: none has it."""
        numbers = self._lookup.find(keys)
        numbers[(numbers >= 0) & ~np.append(self._exists, False)[numbers]] = -1
        missing = np.flatnonzero(numbers < 0)
        recent = self._recent_keys.find(keys[missing])
        numbers[missing] = np.where(recent < 0, -1, recent + len(self._exists))
        return numbers

    def _find(self, name: str) -> TextShard | None:
        """Return the shard of a caption's hash."""
        number = int(self._shards_of(np.array([int(name[:16], 16)], np.uint64))[0])
        covered = self._lookup.shards
        return None if number < 0 else covered[number] if number < len(covered) else self._recent[number - len(covered)]

    def embedding(self, caption: str) -> Tensor:
        """Return a caption's vectors (tokens, dim), as stored. Raises KeyError, UserError."""
        name = caption_hash(caption)
        shard = self._find(name)
        if shard is None:
            raise KeyError(caption)
        try:
            vectors: Tensor = self._tensors(shard).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise cache_file_error(error, self._storage.path(f"{shard.name}.safetensors"),
                                   "delete it together with its .parquet and embed again") from error
        return vectors

    def _tensors(self, shard: TextShard) -> Any:
        """Open a shard; the last few stay open."""
        if shard.name not in self._open:
            name, file, limit = f"{shard.name}.safetensors", None, OPEN_SHARDS
            if isinstance(self._storage, LocalStorage):
                path = self._storage.folder / name
                open(path, "rb").close()  # for the OSError with its errno, which safetensors reduces to a message
            else:
                file = shard_cache().fetch(self._storage, name, shard.bytes)
                path, limit = file.path, OPEN_REMOTE_SHARDS
            while len(self._open) >= limit:
                self._open.popitem(last=False)
            self._open[shard.name] = safe_open(path, framework="pt"), file
        self._open.move_to_end(shard.name)
        return self._open[shard.name][0]

    @property
    def lookup_is_due(self) -> bool:
        """Whether many shards are not in the lookup."""
        return len(self._recent) >= RECENT_SHARDS

    def update_lookup(self) -> None:
        """Write a lookup of all shards, if that is due. For who holds the store."""
        if not self.lookup_is_due:
            return
        counts = np.bincount(np.concatenate([self._recent_keys.bin(k)[1] for k in range(self._recent_keys.num_bins)]),
                             minlength=len(self._recent)).tolist()
        shards = [shard for shard, exists in zip(self._lookup.shards, self._exists, strict=True) if exists]
        recent = np.arange(len(shards), len(shards) + len(self._recent), dtype=np.int32)
        shards += [shard._replace(captions=count) for shard, count in zip(self._recent, counts, strict=True)]
        numbers = np.where(self._exists, self._exists.cumsum() - 1, -1).astype(np.int32)
        write_lookup(self._storage, shards, [(self._lookup, numbers), (self._recent_keys, recent)])


def list_shards(storage: Storage) -> dict[str, int]:
    """Return the committed shards of a store, in order, with the bytes of their tensors; -1: these are missing."""
    folders = ["", *(f"{name}/" for name in storage.folders("") if name.isdecimal())]
    found: dict[str, int] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for folder, sizes in zip(folders, map_ahead(pool, storage.sizes, folders, READERS), strict=True):
            for name in sorted(name.removesuffix(".parquet") for name in sizes if name.endswith(".parquet")):
                found[f"{folder}{name}"] = sizes.get(f"{name}.safetensors", -1)
    return found


def text_storage(cache: Storage | Path | str, encoder: TextEncoder | TextStore) -> Storage:
    """Return the folder of a cache for the embeddings of an encoder; it need not exist."""
    return open_storage(cache).inside(f"text/{encoder.fingerprint[:16]}")


def text_folders(cache: Storage | Path | str) -> list[Storage]:
    """Return the folders of a cache that hold embeddings."""
    storage = open_storage(cache)
    return [storage.inside(f"text/{name}") for name in storage.folders("text")
            if storage.exists(f"text/{name}/{ENCODER}")]


def text_stores(cache: Storage | Path | str) -> list[TextStore]:
    return list(map(TextStore, text_folders(cache)))


def _read_description(storage: Storage) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read(ENCODER))
    except FileNotFoundError as error:
        raise UserError(f"{storage.path(ENCODER)} does not exist") from error
    except ValueError as error:
        raise UserError(f"{storage.path(ENCODER)} is broken: it is not JSON ({error}); restore it, or delete the "
                        "folder and embed again") from error
    return found


def read_rows(storage: Storage, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of a shard. Raises UserError."""
    index = f"{name}.parquet"
    try:
        with storage.open(index) as file:
            return pq.read_table(file, columns=columns, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise cache_file_error(error, storage.path(index),
                               "delete it and embed again: only its captions are re-embedded") from error


def _read_hashes(storage: Storage, shard: TextShard) -> pa.Table:
    """Read the caption hashes of a shard. Raises UserError, also if its tensors have another size than recorded."""
    table = read_rows(storage, shard.name, ["caption_hash"])
    recorded = json.loads((table.schema.metadata or {}).get(b"odvae", b"{}")).get("bytes")
    if recorded is not None and shard.bytes != recorded:
        raise _damaged(storage, shard.name)
    return table


def _damaged(storage: Storage, name: str) -> UserError:
    return UserError(f"{storage.path(name)}.safetensors is damaged or missing; delete {name}.parquet beside it and "
                     "embed again: only its captions are re-embedded")
