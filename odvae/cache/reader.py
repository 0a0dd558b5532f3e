"""Read a latent cache: an index whose columns are loaded on first use, and latents by mmap without a copy."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..data.failures import cache_file_error
from ..inference.fingerprint import DTYPES, vae_fingerprint
from ..utils.errors import UserError
from . import format as fmt

ALWAYS_READ = ("shape", "bucket")  # columns that every reader needs


class LatentCache:
    """The latents of a collection, in the order of its shards.

    Can be pickled and used in data loader workers; every process maps the files itself.

    Args:
        path: the cache folder.
        vae: the autoencoder that the latents must belong to; None: any.
        transform: required fields of the transform, such as {"frame_rate": 8.0}; None: none.

    Attributes:
        header: the VAE and the transform.

    Raises:
        UserError: no cache, an unknown version, another VAE or transform (naming each field that differs), no clips, a
            shard that is missing or damaged.
    """

    def __init__(self, path: Path | str, vae: Any = None, transform: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.header = fmt.read_header(self.path)
        self._check(vae, transform or {})
        self._shards = fmt.committed_shards(self.path)
        tables = self._read(ALWAYS_READ)
        replaced = {name for _, notes in tables for name in notes.replaces}
        kept = [(name, table) for name, table in zip(self._shards, tables, strict=True) if name not in replaced]
        self._shards, tables = [name for name, _ in kept], [table for _, table in kept]
        # The first row of each shard.
        self._first: list[int] = [0, *itertools.accumulate(len(table) for table, _ in tables)]
        if not self._first[-1]:
            raise UserError(f"{self.path} has no clips yet; finish it with `odvae cache build`")
        for name, (_, notes) in zip(self._shards, tables, strict=True):
            fmt.check_tensors(self.path, name, notes)
        self._columns = {name: pa.chunked_array([chunk for table, _ in tables for chunk in table[name].chunks],
                                                fmt.SCHEMA.field(name).type) for name in ALWAYS_READ}
        self._moments = fmt.Moments.merged(notes.moments for _, notes in tables if notes.moments is not None)
        self._mapped: dict[int, _MappedShard] = {}

    def _check(self, vae: Any, transform: dict[str, Any]) -> None:
        own = self.header.vae
        if vae is not None and vae_fingerprint(vae) != own.fingerprint:
            other = fmt.vae_header(vae, latent_channels=own.latent_channels, temporal=own.temporal_compression_ratio,
                                   spatial=own.spatial_compression_ratio)
            raise UserError(f"{self.path} was built with another VAE ({'; '.join(fmt.vae_differences(own, other))}); "
                            "build a cache with this VAE, or load the other one")
        stored = self.header.transform.model_dump()
        different = [f"transform.{key}: {stored.get(key)} in the cache, {value} now" for key, value in transform.items()
                     if stored.get(key) != value]
        if different:
            raise UserError(f"{self.path} was built with another transform ({'; '.join(different)}); build a cache "
                            "with this one")

    def _read(self, columns: tuple[str, ...]) -> list[tuple[pa.Table, fmt.ShardNotes]]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda name: fmt.read_index(fmt.shard_paths(self.path, name)[1], columns),
                                 self._shards))

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # mappings belong to a process

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the index (`format.SCHEMA`); it is read on first use."""
        if name not in self._columns:
            self._columns[name] = pa.chunked_array(
                [chunk for table, _ in self._read((name,)) for chunk in table[name].chunks],
                fmt.SCHEMA.field(name).type)
        return self._columns[name]

    @property
    def index(self) -> pa.Table:
        """All rows and columns of `format.SCHEMA`."""
        return pa.table([self.column(name) for name in fmt.SCHEMA.names], schema=fmt.SCHEMA)

    @cached_property
    def ids(self) -> list[str]:
        ids: list[str] = self.column("id").to_pylist()
        return ids

    @cached_property
    def captions(self) -> list[str]:
        """Each clip's first caption; the column "captions" has all."""
        captions: list[str] = pc.list_element(self.column("captions"), 0).to_pylist()
        return captions

    def all_captions(self) -> pa.Table:
        """Return every caption of every clip in order, as `caption` and `caption_hash`, duplicates included."""
        return pa.table({"caption": pc.list_flatten(self.column("captions")),
                         "caption_hash": pc.list_flatten(self.column("caption_hashes"))})

    @cached_property
    def shapes(self) -> np.ndarray:
        """(clips, 4): (c, t, h, w) of each mean latent; t is 1 for a photo."""
        # Not `to_numpy`, which imports pandas.
        flat = np.from_dlpack(pa.concat_arrays([chunk.flatten() for chunk in self._columns["shape"].chunks]))
        shapes = flat.reshape(-1, 4).copy()
        shapes[:, 0] = self.header.vae.latent_channels
        return shapes

    @cached_property
    def buckets(self) -> dict[str, np.ndarray]:
        """The clips of each bucket; latents of one bucket have one shape."""
        coded = self._columns["bucket"].combine_chunks().dictionary_encode()
        codes = np.from_dlpack(coded.indices)
        return {name: np.flatnonzero(codes == code) for code, name in enumerate(coded.dictionary.to_pylist())}

    @property
    def latents_mean(self) -> list[float]:
        """Mean per channel, over all values of the mean latents as stored."""
        mean: list[float] = self._moments.mean.tolist()
        return mean

    @property
    def latents_std(self) -> list[float]:
        """Standard deviation per channel, over all values of the mean latents as stored."""
        std: list[float] = self._moments.std.tolist()
        return std

    def entry(self, i: int) -> Tensor:
        """Return the mean of latent i as stored: raw (not normalised), (c, t, h, w), in the cache's dtype.

        It is a view of the mapped file, not a copy. Raises IndexError, UserError.
        """
        latent = self.stored(i)
        return latent if self.header.stored == "mean" else latent[: self.header.vae.latent_channels]

    def stored(self, i: int) -> Tensor:
        """Return latent i as stored: as `entry`, or mean and log-variance (2c, t, h, w) if the cache holds both."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"entry {i} of a cache of {len(self)} clips")
        i %= len(self)
        shard = bisect_right(self._first, i) - 1
        mapped = self._mapped.get(shard)
        if mapped is None:
            mapped = self._mapped[shard] = self._map(shard)
        return mapped.tensor(i - self._first[shard])

    def _map(self, shard: int) -> _MappedShard:
        tensors, index = fmt.shard_paths(self.path, self._shards[shard])
        ids = fmt.read_index(index, ("id",))[0]["id"].to_pylist()
        try:
            return _MappedShard(tensors, ids, DTYPES[self.header.dtype])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise cache_file_error(error, tensors, "delete it together with its .parquet and build again: only its "
                                   "clips are re-encoded") from error


def dictionary_encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Encode a column of text without nulls as (N,) codes, and the text of each code."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    return np.concatenate([np.from_dlpack(chunk.indices) for chunk in chunks]), chunks[0].dictionary


class _MappedShard:
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


NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
