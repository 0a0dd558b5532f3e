"""Caption embeddings in a cache: each caption once per text encoder, trimmed to its length.

    text/FINGERPRINT/encoder.json         the encoder's fingerprint, name and width
    text/FINGERPRINT/NAME.safetensors     one tensor (tokens, dim) per caption, named by the caption's hash
    text/FINGERPRINT/NAME.parquet         one row per caption; it commits the shard, as with latents
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.failures import cache_file_error
from ..utils.errors import UserError
from ..utils.locks import lock
from ..utils.progress import bar
from ..utils.storage import LocalStorage, Storage, open_storage
from ..utils.threads import map_ahead
from .format import caption_hash
from .hashes import HashMap, HashSet, hash_keys
from .partition import READERS, parquet_bytes
from .shard_cache import CachedFile, shard_cache

SHARD_BYTES = 2**27
BLOCK = 2**18  # captions that are in memory
ENCODER = "encoder.json"
OPEN_SHARDS = 64  # of an object store
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

    Args:
        folder: text/FINGERPRINT in a cache: a path, a URL of fsspec, or their storage.
    """

    def __init__(self, folder: Storage | Path | str) -> None:
        self._storage = open_storage(folder)
        self.folder = Path(self._storage.root)  # of a local cache
        description = _read_description(self._storage)
        self.fingerprint: str = description["fingerprint"]
        self.name: str = description["name"]
        self.dim: int = description["dim"]
        self._open: OrderedDict[str, tuple[Any, CachedFile | None]] = OrderedDict()
        sizes = self._storage.sizes("")
        self._sizes = {name: sizes.get(f"{name}.safetensors", -1) for name in
                       sorted(name.removesuffix(".parquet") for name in sizes if name.endswith(".parquet"))}
        self._names = list(self._sizes)
        # A dict of a million captions takes 200 MB in each process; this 12.
        with ThreadPoolExecutor(READERS) as pool:
            self._shards = HashMap(map_ahead(pool, self._read_keys, self._names, 2 * READERS))

    def _read_keys(self, name: str) -> np.ndarray:
        return hash_keys(_read_hashes(self._storage, name, self._sizes[name])["caption_hash"])

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption_hash(caption)) is not None

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return a bool for each of some `hash_keys`: whether its caption is stored."""
        return np.asarray(self._shards.find(keys) >= 0)

    def _find(self, name: str) -> str | None:
        """Return the shard of a caption's hash."""
        number = int(self._shards.find(np.array([int(name[:16], 16)], np.uint64))[0])
        return None if number < 0 else self._names[number]

    def embedding(self, caption: str) -> Tensor:
        """Return a caption's vectors (tokens, dim), as stored. Raises KeyError, UserError."""
        name = caption_hash(caption)
        shard = self._find(name)
        if shard is None:
            raise KeyError(caption)
        try:
            vectors: Tensor = self._tensors(shard).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise cache_file_error(error, self._storage.path(f"{shard}.safetensors"),
                                   "delete it together with its .parquet and embed again") from error
        return vectors

    def _tensors(self, shard: str) -> Any:
        """Open a shard; the last few of an object store stay open."""
        if shard not in self._open:
            name, file = f"{shard}.safetensors", None
            if isinstance(self._storage, LocalStorage):
                path = self._storage.folder / name
                open(path, "rb").close()  # for the OSError with its errno, which safetensors reduces to a message
            else:
                file = shard_cache().fetch(self._storage, name, self._sizes[shard])
                path = file.path
                while len(self._open) >= OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open[shard] = safe_open(path, framework="pt"), file
        self._open.move_to_end(shard)
        return self._open[shard][0]


def text_storage(cache: Storage | Path | str, encoder: TextEncoder) -> Storage:
    """Return the folder of a cache for the embeddings of an encoder; it need not exist."""
    return open_storage(cache).inside(f"text/{encoder.fingerprint[:16]}")


def text_folders(cache: Storage | Path | str) -> list[Storage]:
    """Return the folders of a cache that hold embeddings."""
    storage = open_storage(cache)
    return [storage.inside(f"text/{name}") for name in storage.folders("text")
            if storage.exists(f"text/{name}/{ENCODER}")]


def text_stores(cache: Storage | Path | str) -> list[TextStore]:
    return list(map(TextStore, text_folders(cache)))


def embed_captions(cache: Storage | Path | str, encoder: TextEncoder, captions: Iterable[str], *, name: str = "",
                   batch: int = 64) -> tuple[TextStore, int]:
    """Embed the captions that the cache does not hold yet for this encoder; returns the store and their number.

    Vectors are stored in float16, or in bfloat16 if a value is too large for that. Several processes may do this at
    the same time; one works, and the others wait. Into an object store the processes of several hosts write the same.
    `captions` may be very many, and come twice.

    Args:
        name: of the encoder, for display.
    """
    storage, blocks = text_storage(cache, encoder), _blocks(captions)
    if storage.exists(ENCODER):  # a complete store is used without writing, as in a read-only cache
        store = TextStore(storage)
        block = next((block for block in blocks if not store.has(_keys_of(block)).all()), None)
        if block is None:
            return store, 0
        blocks = chain([block], blocks)
    with _locked(storage):
        if not storage.exists(ENCODER):
            description = {"fingerprint": encoder.fingerprint, "name": name or type(encoder).__name__,
                           "dim": encoder.dim}
            storage.write(ENCODER, (json.dumps(description, indent=2) + "\n").encode())
        count = _embed(storage, encoder, blocks, batch)
    return TextStore(storage), count


def _blocks(captions: Iterable[str]) -> Iterator[list[str]]:
    """Yield captions in sorted blocks, each without duplicates."""
    remaining = iter(captions)
    while block := list(islice(remaining, BLOCK)):
        yield sorted(set(block))


def _keys_of(captions: Sequence[str]) -> np.ndarray:
    return hash_keys(pa.array(map(caption_hash, captions), pa.string()))


def _embed(storage: Storage, encoder: TextEncoder, blocks: Iterable[list[str]], batch: int) -> int:
    """Embed and store the captions that a store does not hold; returns their number."""
    store, new = TextStore(storage), HashSet()
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    size = count = 0
    with bar(0, "embed captions", "caption") as progress:
        for block in blocks:
            known = store.has(_keys_of(block)) | new.contains(map(caption_hash, block))
            missing = [caption for caption, is_known in zip(block, known, strict=True) if not is_known]
            new.update(map(caption_hash, missing))
            count += len(missing)
            progress.total = count
            for caption, vector in zip(missing, embeddings(encoder, missing, batch), strict=True):
                stored = to_stored_dtype(vector)
                tensors[caption_hash(caption)] = stored
                size += stored.nbytes
                rows.append({"caption_hash": caption_hash(caption), "caption": caption, "tokens": len(stored),
                             "checksum": checksum(stored)})
                if size > SHARD_BYTES:
                    _commit(storage, tensors, rows)
                    tensors, rows, size = {}, [], 0
                progress.update(1)
    if tensors:
        _commit(storage, tensors, rows)
    return count


@contextmanager
def _locked(storage: Storage) -> Iterator[None]:
    """Hold a store for this process; others of this host wait."""
    if isinstance(storage, LocalStorage):
        path = storage.folder / ".lock"
    else:
        path = shard_cache().folder / f".text-{hashlib.sha256(storage.root.encode()).hexdigest()[:16]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = lock(path, "", wait=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if held is not None:
            held.release()


def embeddings(encoder: TextEncoder, captions: Sequence[str], batch: int = 64) -> Iterator[Tensor]:
    """Yield each caption's vectors (tokens, dim), without padding, on the CPU."""
    for begin in range(0, len(captions), batch):
        vectors, masks = encoder.encode(captions[begin : begin + batch])
        for vector, mask in zip(vectors.cpu(), masks.cpu(), strict=True):
            yield vector[mask]


def to_stored_dtype(vector: Tensor) -> Tensor:
    """Convert to float16, or to bfloat16 if a value is too large for that."""
    half = vector.half()
    return (half if torch.isfinite(half).all() else vector.bfloat16()).contiguous()


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def _commit(storage: Storage, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    name = hashlib.sha256(" ".join(tensors).encode()).hexdigest()[:16]
    data = save(tensors)
    storage.write(f"{name}.safetensors", data)
    storage.write(f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=SCHEMA), {"bytes": len(data)}))


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


def _read_hashes(storage: Storage, name: str, size: int) -> pa.Table:
    """Read the caption hashes of a shard. Raises UserError, also if its tensors, of `size` bytes or missing (-1), have
    another size than recorded."""
    table = read_rows(storage, name, ["caption_hash"])
    recorded = json.loads((table.schema.metadata or {}).get(b"odvae", b"{}")).get("bytes")
    if recorded is not None and size != recorded:
        raise UserError(f"{storage.path(name)}.safetensors is damaged or missing; delete {name}.parquet beside it and "
                        "embed again: only its captions are re-embedded")
    return table
