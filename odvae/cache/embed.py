"""Embed captions and store them in a cache, each once per text encoder, trimmed to its length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor

from ..utils.locks import lock
from ..utils.progress import bar
from ..utils.storage import LocalStorage, Storage
from .format import caption_hash
from .hashes import HashSet, hash_keys
from .partition import parquet_bytes
from .shard_cache import shard_cache
from .text import ENCODER, SCHEMA, TextEncoder, TextStore, text_storage

SHARD_BYTES = 2**27
SHARDS_A_FOLDER = 1024
BLOCK = 2**18  # captions that are in memory


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
        if block is None and not store.lookup_is_due:
            return store, 0
        blocks = chain([block or []], blocks)
    with _locked(storage):
        if not storage.exists(ENCODER):
            description = {"fingerprint": encoder.fingerprint, "name": name or type(encoder).__name__,
                           "dim": encoder.dim}
            storage.write(ENCODER, (json.dumps(description, indent=2) + "\n").encode())
        count = _embed(storage, encoder, blocks, batch)
        TextStore(storage).update_lookup()
    return TextStore(storage), count


def _blocks(captions: Iterable[str]) -> Iterator[list[str]]:
    """Yield captions in blocks, each without duplicates. They stay in order: those of a shard of latents come together,
    so that a training that reads shard by shard does so here too."""
    remaining = iter(captions)
    while block := list(islice(remaining, BLOCK)):
        yield list(dict.fromkeys(block))


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
    name = _open_folder(storage) + hashlib.sha256(" ".join(tensors).encode()).hexdigest()[:16]
    data = save(tensors)
    storage.write(f"{name}.safetensors", data)
    storage.write(f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=SCHEMA), {"bytes": len(data)}))


def _open_folder(storage: Storage) -> str:
    """Return the folder for the next shard, with its /: the first is the store's own, ""."""
    last = max((name for name in storage.folders("") if name.isdecimal()), default="")
    if sum(name.endswith(".parquet") for name in storage.sizes(last)) < SHARDS_A_FOLDER:
        return last and f"{last}/"
    return f"{int(last or 0) + 1:05d}/"
