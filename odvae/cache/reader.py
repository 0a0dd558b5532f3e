"""Read a latent cache: an index whose columns are loaded on first use, and latents by mmap without a copy.

Of a cache in an object store, shards are copied to this machine as they are needed (`shard_cache`), and columns that
training needs of single clips are read with them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from ..data.failures import cache_file_error
from ..inference.fingerprint import DTYPES
from ..utils.errors import UserError
from ..utils.storage import LocalStorage, open_storage
from ..utils.threads import map_ahead
from . import format as fmt
from .mapped_shard import LoadedShard, LoadedShards, MappedShard
from .moments import Moments
from .partition import READERS, Partition, PartitionRows, Shard, iter_partitions, read_partition, tensors_of
from .shard_cache import shard_cache

PARTITIONS_WITH_IDS = 4  # whose clip IDs are kept, for the shards that are mapped next
LARGE = 2**24  # clips, from which lists of all of them take too much memory
ROW = ("id", "captions")  # columns that are read with a shard


class LatentCache:
    """The latents of a collection, in the order of its shards.

    Can be pickled and used in data loader workers; every process maps the files itself. What another process adds
    meanwhile is not seen.

    Args:
        path: the cache folder, or a URL of fsspec.
        vae: the autoencoder that the latents must belong to; None: any.
        transform: required fields of the transform, such as {"frame_rate": 8.0}; None: none.

    Attributes:
        header: the VAE and the transform.
        path: the folder, or the URL as text.
        bucket_shapes: (c, t, h, w) of the mean latents of each bucket.
        parts: the partitions.
        codes: (clips,) the number of each clip's bucket, in the order of `bucket_shapes`.

    Raises:
        UserError: no cache, an unknown version, another VAE or transform (naming each field that differs), no clips, a
            shard that is missing or damaged.
    """

    def __init__(self, path: Path | str, vae: Any = None, transform: dict[str, Any] | None = None) -> None:
        self._storage = open_storage(path)
        self.is_local = isinstance(self._storage, LocalStorage)
        self.path: Path | str = Path(path) if self.is_local else self._storage.root
        self.header = fmt.read_header(self._storage)
        fmt.check_header(self.header, self.path, vae, transform or {})
        self._shards: list[tuple[int, Shard]] = []  # with the number of the partition
        self._names: dict[int, list[str]] = {}  # of the shards of each partition
        self.parts: list[PartitionRows] = []
        codes, moments, clips = [np.zeros(0, np.int16)], list[Moments](), 0
        self.bucket_shapes: dict[str, tuple[int, ...]] = {}
        for partition in iter_partitions(self._storage, ("bucket",), encoded=True):
            self._shards += [(partition.number, replace(shard, moments=None)) for shard in partition.shards]
            self._names[partition.number] = [shard.name for shard in partition.shards]
            self.parts.append(PartitionRows(partition.number, clips, partition.least_content))
            codes.append(self._code_buckets(partition))
            clips += len(partition.table)
            if (merged := partition.moments()) is not None:
                moments.append(merged)
        self._first = [0, *itertools.accumulate(shard.clips for _, shard in self._shards)]  # row of each shard
        if not self._first[-1]:
            raise UserError(f"{self.path} has no clips yet; finish it with `odvae cache build`")
        self.codes = np.concatenate(codes)
        self._moments = Moments.merged(moments)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._mapped: dict[int, MappedShard] = {}
        self._ids: dict[int, dict[str, list[str]]] = {}  # by partition and shard
        self._loaded: LoadedShards | None = None  # of a cache that is not local

    def _code_buckets(self, partition: Partition) -> np.ndarray:
        """Return the number of each row's bucket in `bucket_shapes`."""
        if not len(partition.table):
            return np.zeros(0, np.int16)
        coded = partition.table["bucket"].unify_dictionaries().combine_chunks()
        codes, names = np.from_dlpack(coded.indices), coded.dictionary.to_pylist()
        if not self.bucket_shapes.keys() >= set(names):  # few partitions have a new bucket
            shapes = self.read_rows(partition.number, ("shape",))["shape"]
            for code, row in zip(*(found.tolist() for found in np.unique(codes, return_index=True)), strict=True):
                self.bucket_shapes.setdefault(names[code], (self.header.vae.latent_channels, *shapes[row].as_py()[1:]))
        numbers = {name: number for number, name in enumerate(self.bucket_shapes)}
        numbered: np.ndarray = np.array([numbers.get(name, -1) for name in names], np.int16)[codes]
        return numbered

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_ids": {}, "_loaded": None}  # mappings belong to a process

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the index (`format.SCHEMA`); it is read on first use."""
        if name not in self._columns:
            with ThreadPoolExecutor(READERS) as pool:
                tables = pool.map(lambda number: self._rows(number, (name,)), self._names)
                self._columns[name] = pa.chunked_array(
                    [chunk for some in tables for table in some.values() for chunk in table[name].chunks],
                    fmt.SCHEMA.field(name).type)
        return self._columns[name]

    def scan(self, columns: Sequence[str],
             parts: Sequence[PartitionRows] | None = None) -> Iterator[tuple[PartitionRows, pa.Table]]:
        """Yield columns of one of `parts` (None: all) after the other; a few are read ahead, and none is kept. Raises
        UserError as `column`."""
        parts = self.parts if parts is None else parts
        with ThreadPoolExecutor(READERS) as pool:
            yield from zip(parts, map_ahead(pool, lambda part: self.read_rows(part.number, columns), parts, READERS),
                           strict=True)

    def read_rows(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a partition. Raises UserError as `column`."""
        tables = list(self._rows(number, columns).values())
        return pa.concat_tables(tables) if tables else fmt.SCHEMA.empty_table().select(list(columns))

    def take(self, rows: Sequence[int], column: str) -> list[Any]:
        """Return the values of some clips in a column. Of a large cache, only their partitions are read."""
        if self.lists_clips or column in self._columns:
            values: list[Any] = self.column(column).take(pa.array(rows, pa.int64())).to_pylist()
            return values
        shards = [bisect_right(self._first, row) - 1 for row in rows]
        numbers = sorted({self._shards[shard][0] for shard in shards})
        with ThreadPoolExecutor(READERS) as pool:
            tables = dict(zip(numbers, pool.map(lambda number: self._rows(number, (column,)), numbers), strict=True))
        return [tables[number][shard.name][column][row - self._first[position]].as_py()
                for row, position in zip(rows, shards, strict=True) for number, shard in [self._shards[position]]]

    def value(self, i: int, column: str) -> Any:
        """Return a clip's value in a column. Of a large cache, and of one in an object store, only columns of `ROW`,
        which are read with its shard."""
        if column not in self._columns and not self.lists_clips and column in ROW:
            position = bisect_right(self._first, i) - 1
            return self.load(position).rows[column][i - self._first[position]].as_py()
        return self.column(column)[i].as_py()

    def _rows(self, number: int, columns: Sequence[str]) -> dict[str, pa.Table]:
        """Return columns of the shards of a partition. Raises UserError if one is gone."""
        partition = read_partition(self._storage, number, columns, check=False).with_uncommitted()
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

    def iter_captions(self) -> Iterator[pa.ChunkedArray]:
        """Yield every caption of every clip in order, a partition at a time, duplicates included."""
        yield from (pc.list_flatten(table["captions"]) for _, table in self.scan(("captions",)))

    @property
    def shapes(self) -> np.ndarray:
        """(clips, 4): (c, t, h, w) of each mean latent; t is 1 for a photo."""
        return np.array(list(self.bucket_shapes.values()))[self.codes]

    def shape(self, i: int) -> tuple[int, ...]:
        """Return (c, t, h, w) of one mean latent."""
        return list(self.bucket_shapes.values())[self.codes[i]]

    @cached_property
    def buckets(self) -> dict[str, np.ndarray]:
        """The clips of each bucket; latents of one bucket have one shape."""
        dtype = np.int32 if len(self) < 2**31 else np.int64
        return {name: np.flatnonzero(self.codes == number).astype(dtype)
                for number, name in enumerate(self.bucket_shapes)}

    @property
    def bucket_names(self) -> list[str]:
        return list(self.bucket_shapes)

    @property
    def lists_clips(self) -> bool:
        """Whether training lists its clips: they are on this machine and not too many. Else it draws shards, see
        `order`."""
        return self.is_local and len(self) < LARGE

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(shards + 1,): the first clip of each shard, and the number of clips."""
        return np.array(self._first)

    @cached_property
    def shard_counts(self) -> np.ndarray:
        """(shards, buckets): the number of clips."""
        return np.stack([np.bincount(self.codes[first:end], minlength=len(self.bucket_shapes)).astype(np.int32)
                         for first, end in itertools.pairwise(self._first)])

    def shard_of(self, i: int) -> int:
        """Return the position of a clip's shard in the cache."""
        return bisect_right(self._first, i) - 1

    def shard_bytes(self, shards: Sequence[int]) -> int:
        return sum(self._shards[shard][1].bytes for shard in shards)

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
            if not self.is_local:
                return self.load(shard).tensors.tensor(i - self._first[shard])
            mapped = self._mapped[shard] = self._map(shard)
        return mapped.tensor(i - self._first[shard])

    def load(self, position: int) -> LoadedShard:
        """Return a shard with its rows. Of a cache in an object store, it is copied to this machine if it is not
        there."""
        if self._loaded is None:
            self._loaded = LoadedShards(self._load, lambda shard: self._shards[shard][1].bytes, shard_cache())
        return self._loaded.get(position)

    def _load(self, position: int) -> LoadedShard:
        number, shard = self._shards[position]
        rows = self._rows(number, ROW)[shard.name]
        rows = rows.take(pa.array(range(len(rows)), pa.int64()))  # a copy: a slice would keep the partition's rows
        file = None if self.is_local else shard_cache().fetch(self._storage, tensors_of(number, shard.name),
                                                              shard.bytes)
        path = Path(self.path) / tensors_of(number, shard.name) if file is None else file.path
        return LoadedShard(self._open(path, position, rows["id"].to_pylist()), rows, file, shard.bytes)

    def _map(self, position: int) -> MappedShard:
        number, shard = self._shards[position]
        if number not in self._ids:
            while len(self._ids) >= PARTITIONS_WITH_IDS:
                del self._ids[next(iter(self._ids))]
            self._ids[number] = {name: table["id"].to_pylist() for name, table in
                                 self._rows(number, ("id",)).items()}
        return self._open(Path(self.path) / tensors_of(number, shard.name), position, self._ids[number][shard.name])

    def _open(self, path: Path, position: int, ids: list[str]) -> MappedShard:
        try:
            return MappedShard(path, ids, DTYPES[self.header.dtype])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            number, shard = self._shards[position]
            name = self._storage.path(tensors_of(number, shard.name))
            raise cache_file_error(error, name, f"run `odvae cache verify {self.path} --repair` and build again: only "
                                   "its clips are re-encoded") from error
