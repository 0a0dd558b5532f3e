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
from ..utils.storage import LocalStorage, open_storage
from . import format as fmt
from .moments import Moments
from .partition import READERS, Shard, iter_partitions, read_partition, tensors_of

PARTITIONS_WITH_IDS = 4  # whose clip IDs are kept, for the shards that are mapped next


class LatentCache:
    """The latents of a collection, in the order of its shards.

    Can be pickled and used in data loader workers; every process maps the files itself. What another process adds
    meanwhile is not seen.

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
        self._storage = open_storage(path)
        self.header = fmt.read_header(self._storage)
        self._check(vae, transform or {})
        self._shards: list[tuple[int, Shard]] = []  # with the number of the partition
        self._names: dict[int, list[str]] = {}  # of the shards of each partition
        codes, moments = [np.zeros(0, np.int16)], list[Moments]()
        self._bucket_shapes: dict[str, tuple[int, ...]] = {}  # of the mean latents of each bucket
        for partition in iter_partitions(self._storage, ("bucket", "shape")):
            self._shards += [(partition.number, shard) for shard in partition.shards]
            self._names[partition.number] = [shard.name for shard in partition.shards]
            codes.append(self._code_buckets(partition.table))
            if (merged := partition.moments()) is not None:
                moments.append(merged)
        self._first = [0, *itertools.accumulate(shard.clips for _, shard in self._shards)]  # row of each shard
        if not self._first[-1]:
            raise UserError(f"{self.path} has no clips yet; finish it with `odvae cache build`")
        self._codes = np.concatenate(codes)
        self._moments = Moments.merged(moments)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._mapped: dict[int, _MappedShard] = {}
        self._ids: dict[int, dict[str, list[str]]] = {}  # by partition and shard

    def _code_buckets(self, table: pa.Table) -> np.ndarray:
        """Return the number of each row's bucket in `_bucket_shapes`."""
        if not len(table):
            return np.zeros(0, np.int16)
        coded = table["bucket"].combine_chunks().dictionary_encode()
        codes, shapes = np.from_dlpack(coded.indices), table["shape"]
        names: list[str] = coded.dictionary.to_pylist()
        _, first_rows = np.unique(codes, return_index=True)
        for name, row in zip(names, first_rows.tolist(), strict=True):
            self._bucket_shapes.setdefault(name, (self.header.vae.latent_channels, *shapes[row].as_py()[1:]))
        numbers = {name: number for number, name in enumerate(self._bucket_shapes)}
        numbered: np.ndarray = np.array([numbers[name] for name in names], np.int16)[codes]
        return numbered

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

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_ids": {}}  # mappings belong to a process

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the index (`format.SCHEMA`); it is read on first use."""
        if name not in self._columns:
            with ThreadPoolExecutor(READERS) as pool:
                tables = pool.map(lambda number: self._rows(number, name), self._names)
                self._columns[name] = pa.chunked_array(
                    [chunk for some in tables for table in some.values() for chunk in table[name].chunks],
                    fmt.SCHEMA.field(name).type)
        return self._columns[name]

    def _rows(self, number: int, column: str) -> dict[str, pa.Table]:
        """Return a column of the shards of a partition. Raises UserError if one is gone."""
        partition = read_partition(self._storage, number, (column,), check=False).with_uncommitted()
        tables = {shard.name: table for shard, table in partition.tables()}
        if gone := [name for name in self._names[number] if name not in tables]:
            raise UserError(f"{self._storage.path(tensors_of(number, gone[0]))} was removed while the cache was open; "
                            "start again")
        return {name: tables[name] for name in self._names[number]}

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

    @property
    def shapes(self) -> np.ndarray:
        """(clips, 4): (c, t, h, w) of each mean latent; t is 1 for a photo."""
        return np.array(list(self._bucket_shapes.values()))[self._codes]

    def shape(self, i: int) -> tuple[int, ...]:
        """Return (c, t, h, w) of one mean latent."""
        return list(self._bucket_shapes.values())[self._codes[i]]

    @cached_property
    def buckets(self) -> dict[str, np.ndarray]:
        """The clips of each bucket; latents of one bucket have one shape."""
        return {name: np.flatnonzero(self._codes == number) for number, name in enumerate(self._bucket_shapes)}

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

    def _map(self, position: int) -> _MappedShard:
        number, shard = self._shards[position]
        if not isinstance(self._storage, LocalStorage):
            raise UserError(f"{self._storage.root} is not on this machine's file system, and latents are read from "
                            "files; copy the cache to a folder")
        path = self.path / tensors_of(number, shard.name)
        if number not in self._ids:
            while len(self._ids) >= PARTITIONS_WITH_IDS:
                del self._ids[next(iter(self._ids))]
            self._ids[number] = {name: table["id"].to_pylist() for name, table in
                                 self._rows(number, "id").items()}
        try:
            return _MappedShard(path, self._ids[number][shard.name], DTYPES[self.header.dtype])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise cache_file_error(error, path, f"run `odvae cache verify {self.path} --repair` and build again: only "
                                   "its clips are re-encoded") from error


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
