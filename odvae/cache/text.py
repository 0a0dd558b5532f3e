"""Caption embeddings in a cache: each caption once per text encoder, trimmed to its length.

    text/FINGERPRINT/encoder.json         the encoder's fingerprint, name and width
    text/FINGERPRINT/NAME.safetensors     one tensor (tokens, dim) per caption, named by the caption's hash
    text/FINGERPRINT/NAME.parquet         one row per caption; it commits the shard, as with latents
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ..data.failures import cache_file_error
from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.locks import lock
from ..utils.progress import bar
from ..utils.storage import LocalStorage, Storage
from .format import caption_hash
from .partition import parquet_bytes

SHARD_BYTES = 2**27
HASH = 32  # bytes of a `caption_hash`
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
        folder: text/FINGERPRINT in a cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = read_json(folder / "encoder.json")
        self.fingerprint: str = description["fingerprint"]
        self.name: str = description["name"]
        self.dim: int = description["dim"]
        self._open: dict[Path, Any] = {}
        self._paths = sorted(folder.glob("[!.]*.parquet"))
        shards = [_read_hashes(index)["caption_hash"] for index in self._paths]
        # A dict of a million captions takes 200 MB in each process; sorted arrays take 40.
        names = pa.chunked_array([chunk for shard in shards for chunk in shard.chunks], pa.string())
        names = names.cast(pa.binary(HASH)).combine_chunks()
        names = np.frombuffer(names.buffers()[1] or b"", f"S{HASH}", len(names), names.offset * HASH)
        order = np.argsort(names)
        self._names = names[order]
        self._shards = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards])[order]

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, caption: str) -> bool:
        return self._path(caption_hash(caption)) is not None

    @property
    def hashes(self) -> pa.Array:
        """Hashes of all captions, in order."""
        return pa.Array.from_buffers(pa.binary(HASH), len(self), [None, pa.py_buffer(self._names)]).cast(pa.string())

    def _path(self, name: str) -> Path | None:
        position = int(np.searchsorted(self._names, name.encode()))
        if position == len(self) or self._names[position] != name.encode():
            return None
        return self._paths[self._shards[position]].with_suffix(".safetensors")

    def embedding(self, caption: str) -> Tensor:
        """Return a caption's vectors (tokens, dim), as stored. Raises KeyError, UserError."""
        name = caption_hash(caption)
        path = self._path(name)
        if path is None:
            raise KeyError(caption)
        try:
            if path not in self._open:
                open(path, "rb").close()  # for the OSError with its errno, which safetensors reduces to a message
                self._open[path] = safe_open(path, framework="pt")
            vectors: Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise cache_file_error(error, path, "delete it together with its .parquet and embed again") from error
        return vectors


def text_folder(cache: Path, encoder: TextEncoder) -> Path:
    """Return the folder of a cache for the embeddings of an encoder; it need not exist."""
    return cache / "text" / encoder.fingerprint[:16]


def text_stores(cache: Path) -> list[TextStore]:
    return [TextStore(path.parent) for path in sorted((cache / "text").glob("*/encoder.json"))]


def embed_captions(cache: Path, encoder: TextEncoder, captions: Iterable[str], *, name: str = "",
                   batch: int = 64) -> tuple[TextStore, int]:
    """Embed the captions that the cache does not hold yet for this encoder; returns the store and their number.

    Vectors are stored in float16, or in bfloat16 if a value is too large for that. Several processes may do this at
    the same time; one works, and the others wait.

    Args:
        name: of the encoder, for display.
    """
    captions = sorted(set(captions))
    folder = text_folder(cache, encoder)
    if (folder / "encoder.json").exists():  # a complete store is used without writing, as in a read-only cache
        store = TextStore(folder)
        if all(caption in store for caption in captions):
            return store, 0
    storage = LocalStorage(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / "encoder.json").exists():
            description = {"fingerprint": encoder.fingerprint, "name": name or type(encoder).__name__,
                           "dim": encoder.dim}
            storage.write("encoder.json", (json.dumps(description, indent=2) + "\n").encode())
        store = TextStore(folder)
        missing = [caption for caption in captions if caption not in store]
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        size = 0
        with bar(len(missing), "embed captions", "caption", disable=not missing) as progress:
            for caption, vector in zip(missing, embeddings(encoder, missing, batch), strict=True):
                stored = to_stored_dtype(vector)
                tensors[caption_hash(caption)] = stored
                size += stored.nbytes
                rows.append({"caption_hash": caption_hash(caption), "caption": caption, "tokens": len(stored),
                             "checksum": _checksum(stored)})
                if size > SHARD_BYTES:
                    _commit(storage, tensors, rows)
                    tensors, rows, size = {}, [], 0
                progress.update(1)
        if tensors:
            _commit(storage, tensors, rows)
    return TextStore(folder), len(missing)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a store for this process; others wait."""
    path = folder / ".lock"
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


def _checksum(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def _commit(storage: Storage, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    name = hashlib.sha256(" ".join(tensors).encode()).hexdigest()[:16]
    data = save(tensors)
    storage.write(f"{name}.safetensors", data)
    storage.write(f"{name}.parquet", parquet_bytes(pa.Table.from_pylist(rows, schema=SCHEMA), {"bytes": len(data)}))


def read_rows(index: Path, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of a shard's index. Raises UserError."""
    try:
        return pq.read_table(index, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise cache_file_error(error, index, "delete it and embed again: only its captions are re-embedded") from error


def _read_hashes(index: Path) -> pa.Table:
    """Read the caption hashes of a shard. Raises UserError, also if its tensors have another size than recorded."""
    table = read_rows(index, ["caption_hash"])
    size = json.loads((table.schema.metadata or {}).get(b"odvae", b"{}")).get("bytes")
    path = index.with_suffix(".safetensors")
    if size is not None and (not path.is_file() or path.stat().st_size != size):
        raise UserError(f"{path} is damaged or missing; delete {index.name} beside it and embed again: only its "
                        "captions are re-embedded")
    return table


def verify_text(cache: Path) -> tuple[int, list[str]]:
    """Verify the embeddings of a cache; returns their number, and what is wrong with them."""
    count, faults = 0, list[str]()
    for index in sorted(path for encoder in (cache / "text").glob("*/encoder.json")
                        for path in encoder.parent.glob("[!.]*.parquet")):
        try:
            rows = read_rows(index).to_pylist()
            faults += _text_faults(index, rows)
            count += len(rows)
        except UserError as error:
            faults.append(str(error))
        except (SafetensorError, OSError) as error:
            path, advice = index.with_suffix(".safetensors"), f"delete {index} and embed again"
            faults.append(str(cache_file_error(error, path, advice)))
    return count, faults


def _text_faults(index: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Compare the checksums of a shard's embeddings with its rows."""
    path = index.with_suffix(".safetensors")
    tensors = load(path.read_bytes())
    return [f"{path}: the checksum of {row['caption']!r} does not match; delete {index} and embed again" for row in rows
            if row["caption_hash"] not in tensors or _checksum(tensors[row["caption_hash"]]) != row["checksum"]]


def copy_text(source: Storage, target: Storage) -> None:
    """Copy the embeddings that `target` lacks from a cache. Raises UserError if they are damaged."""
    if isinstance(source, LocalStorage):
        text_stores(source.folder)
    for folder in (f"text/{name}" for name in source.folders("text")):
        there = target.sizes(folder)
        # Rows last: they commit.
        for name in sorted(source.sizes(folder).keys() - there, key=lambda name: (name.endswith(".parquet"), name)):
            target.write(f"{folder}/{name}", source.read(f"{folder}/{name}"))
