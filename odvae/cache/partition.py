"""The partitions of a cache: which files belong to one, its shards, its index, and how both are committed.

Whatever a build or another command changes in a partition, it commits by one atomic write of the index. A shard that is
written before that has its rows in a .parquet of its own, from which an interrupted build continues.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.failures import cache_file_error
from ..data.spill import partition_hash
from ..utils.errors import UserError
from ..utils.storage import ChangedMeanwhileError, RemoteStorage, Storage
from ..utils.threads import map_ahead
from . import format as fmt
from .moments import Moments

INDEX, FILES, REJECTS = "index.parquet", "files.parquet", "rejects.parquet"
OTHER_FILES = frozenset((INDEX, FILES, REJECTS))
FILES_PREFIX = "files-"  # of probe results that are not in `FILES` yet
CONTENT = fmt.SCHEMA.get_field_index("content")  # also in a file of rows: the columns before it are not nested
METADATA = b"odvae"  # key of our JSON in the metadata of a Parquet file
READERS = 16  # threads that read partitions
NO_ROWS = "~"  # after every hash
Failure = dict[str, Any]  # of a clip that could not be encoded: id, path, start, kind, reason, advice, limit in s


@dataclass(frozen=True)
class Shard:
    """A file of tensors."""

    name: str
    clips: int
    bytes: int  # of the .safetensors; 0: it has no clips, and there is no such file
    moments: Moments | None  # None: no clips

    def encode(self) -> dict[str, Any]:
        m = self.moments
        return {"name": self.name, "clips": self.clips, "bytes": self.bytes, "moments": None if m is None else {
            "count": m.count, "mean": m.mean.tolist(), "squares": m.squares.tolist()}}

    @classmethod
    def decode(cls, raw: Mapping[str, Any]) -> Shard:
        m = raw["moments"]
        return cls(raw["name"], raw["clips"], raw["bytes"], None if m is None else Moments(
            m["count"], np.array(m["mean"]), np.array(m["squares"])))


@dataclass(frozen=True)
class CommittedShard:
    """A shard with its rows, which the index of its partition does not hold yet."""

    shard: Shard
    table: pa.Table  # the columns that were read
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Partition:
    """The content of a partition. Its rows are in the order of its shards."""

    number: int
    generation: int = 0  # how often its index was written
    shards: tuple[Shard, ...] = ()
    failures: tuple[Failure, ...] = ()
    table: pa.Table = field(default_factory=fmt.SCHEMA.empty_table)  # the columns that were read
    uncommitted: tuple[CommittedShard, ...] = ()  # shards of a build that has not committed the partition
    least_content: str = NO_ROWS  # of its rows, those of uncommitted shards included; "" if it is not known

    @property
    def ids(self) -> list[str]:
        ids: list[str] = self.table["id"].to_pylist()
        return ids

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def with_uncommitted(self) -> Partition:
        """Return the partition as it is once its uncommitted shards are in the index."""
        added = [one for one in self.uncommitted if one.shard.clips]
        return replace(self, uncommitted=(), shards=(*self.shards, *(one.shard for one in added)),
                       table=pa.concat_tables([self.table, *(one.table for one in added)]),
                       failures=tuple(({entry["id"]: entry for entry in self.failures} | {
                           entry["id"]: entry for one in self.uncommitted for entry in one.failures}).values()))

    def moments(self) -> Moments | None:
        """Merge the statistics of the shards; None if there are no clips."""
        shards = sorted(self.shards, key=lambda shard: shard.name)  # so that rounding is the same in every build
        parts = [shard.moments for shard in shards if shard.moments is not None]
        return Moments.merged(parts) if parts else None

    def tables(self) -> list[tuple[Shard, pa.Table]]:
        """Return each shard with its rows."""
        first = itertools.accumulate((shard.clips for shard in self.shards), initial=0)
        return [(shard, self.table.slice(begin, shard.clips)) for shard, begin in zip(self.shards, first, strict=False)]


class PartitionRows(NamedTuple):
    """The rows of a partition among those of a cache."""

    number: int
    first: int  # number of its first clip
    least_content: str  # see `Partition`


def partition_of(name: str, count: int) -> int:
    """Return the partition of a source's file, by its name in the source. A video and its .txt are in one, and so are
    all members of a tar or of a Parquet file."""
    return partition_hash(name) % count


def folder_of(number: int) -> str:
    return f"partitions/{number:05d}"


def tensors_of(number: int, shard: str) -> str:
    """Return the name of a shard's tensors in the cache."""
    return f"{folder_of(number)}/{shard}.safetensors"


def rows_of(number: int, shard: str) -> str:
    """Return the name of a shard's own rows in the cache."""
    return f"{folder_of(number)}/{shard}.parquet"


def partition_numbers(storage: Storage) -> list[int]:
    """Return the numbers of the partitions that exist."""
    return sorted(int(name) for name in storage.folders("partitions") if name.isdecimal())


def iter_partitions(storage: Storage, columns: Sequence[str] | None = None, encoded: bool = False,
                    ) -> Iterator[Partition]:
    """Yield the partitions in order, with the shards that are not committed yet; a few are read ahead. Arguments and
    errors as of `read_partition`."""
    with ThreadPoolExecutor(READERS) as pool:
        yield from (partition.with_uncommitted() for partition in map_ahead(
            pool, lambda number: read_partition(storage, number, columns, encoded=encoded), partition_numbers(storage),
            READERS))


def read_partition(storage: Storage, number: int, columns: Sequence[str] | None = None, check: bool = True,
                   encoded: bool = False) -> Partition:
    """Read a partition: its index, and the shards that were committed after it.

    Args:
        columns: of `format.SCHEMA` to read; None: all.
        check: that each shard's tensors exist and have their size.
        encoded: the columns, of text, as dictionary arrays.

    Raises:
        UserError: an index is damaged, or a shard's tensors are missing or truncated.
    """
    for _ in range(3):
        try:
            return _read(storage, number, columns, check, encoded)
        except (FileNotFoundError, UserError):
            # What was listed a moment ago may have changed: a running build writes shards, and moves their rows into
            # the index. Real damage is there the next time too.
            continue
    return _read(storage, number, columns, check, encoded)


def _read(storage: Storage, number: int, columns: Sequence[str] | None, check: bool, encoded: bool) -> Partition:
    sizes, schema = storage.sizes(folder_of(number)), _schema_of(columns, encoded)
    partition = Partition(number, table=schema.empty_table())
    if INDEX in sizes:
        table, raw, least = _read_parquet(storage, f"{folder_of(number)}/{INDEX}", schema, sizes[INDEX])
        partition = Partition(number, raw["generation"], tuple(map(Shard.decode, raw["shards"])),
                              tuple(raw["failures"]), table, least_content=least)
    known = {shard.name for shard in partition.shards}
    uncommitted = []
    for name in sorted(name.removesuffix(".parquet") for name in sizes if name.endswith(".parquet")):
        if name in known or f"{name}.parquet" in OTHER_FILES or name.startswith(FILES_PREFIX):
            continue
        table, raw, least = _read_parquet(storage, rows_of(number, name), schema, sizes[f"{name}.parquet"])
        if raw["generation"] == partition.generation + 1:
            partition = replace(partition, least_content=min(partition.least_content, least))
            uncommitted.append(CommittedShard(Shard.decode(raw["shard"]), table, tuple(raw["failures"])))
    partition = replace(partition, uncommitted=tuple(uncommitted))
    for shard in (*partition.shards, *(one.shard for one in uncommitted)) if check else ():
        size = sizes.get(f"{shard.name}.safetensors", -1)
        if shard.bytes and size != shard.bytes:
            raise UserError(f"{storage.path(tensors_of(number, shard.name))} is "
                            f"{'missing' if size < 0 else 'damaged: it was truncated or changed'}; restore it, or run "
                            f"`odvae cache verify {storage.root} --repair` and build again: only its clips are "
                            "re-encoded")
    return partition


def _schema_of(columns: Sequence[str] | None, encoded: bool) -> pa.Schema:
    if columns is None:
        return fmt.SCHEMA
    fields = map(fmt.SCHEMA.field, columns)
    return pa.schema([field.with_type(pa.dictionary(pa.int32(), field.type)) if encoded else field for field in fields])


def _read_parquet(storage: Storage, name: str, schema: pa.Schema,
                  size: int | None = None) -> tuple[pa.Table, dict[str, Any], str]:
    """Read a file of rows, the JSON in its metadata, and the least "content". `size` in bytes, if it is known, saves a
    request."""
    try:
        whole = isinstance(storage, RemoteStorage) and schema is fmt.SCHEMA  # by one request, not one a column
        # Not mapped: an I/O error in a mapping kills the process.
        opened = io.BytesIO(storage.read(name)) if whole else storage.open(name, size)
        encoded = [field.name for field in schema if pa.types.is_dictionary(field.type)]
        with opened as source, pq.ParquetFile(source, pre_buffer=False, read_dictionary=encoded) as file:
            raw: dict[str, Any] = json.loads((file.schema_arrow.metadata or {})[METADATA])
            # In this thread: the partitions are read in several.
            table, least = file.read(columns=schema.names, use_threads=False), _least_content(file.metadata)
        return table.replace_schema_metadata(None).cast(schema), raw, least
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        advice = ("restore it, or delete it: the next build encodes the partition again" if name.endswith(f"/{INDEX}")
                  else "delete it and build again: only its clips are re-encoded")
        raise cache_file_error(error, storage.path(name), advice) from error


def _least_content(metadata: Any) -> str:
    """Return the least "content" of a file's rows, from its statistics; "" if it has none."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    found = [group.column(CONTENT).statistics for group in groups if group.num_rows]
    return min((one.min if one is not None and one.has_min_max else "" for one in found), default=NO_ROWS)


def write_shard(storage: Storage, number: int, generation: int, added: CommittedShard, tensors: bytes) -> None:
    """Commit a shard of a partition: its tensors, then its rows.

    Args:
        generation: of the partition's index that will hold it.

    Raises:
        OSError: the disk is full or fails; nothing is committed.
    """
    if tensors:
        storage.write(tensors_of(number, added.shard.name), tensors)
    raw = {"version": fmt.VERSION, "generation": generation, "shard": added.shard.encode(),
           "failures": list(added.failures)}
    storage.write(rows_of(number, added.shard.name), parquet_bytes(added.table, raw))


def write_partition(storage: Storage, partition: Partition) -> Partition:
    """Commit a partition's shards, failures and rows by its index, and remove what is left over; returns it as it is
    now. Its `uncommitted` shards are dropped."""
    committed = replace(partition, generation=partition.generation + 1, uncommitted=())
    raw = {"version": fmt.VERSION, "generation": committed.generation,
           "shards": [shard.encode() for shard in committed.shards], "failures": list(committed.failures)}
    folder = folder_of(partition.number)
    _write_index(storage, f"{folder}/{INDEX}", parquet_bytes(committed.table, raw), partition.generation)
    used = OTHER_FILES | {f"{shard.name}.safetensors" for shard in committed.shards}
    for name in storage.sizes(folder).keys() - used:
        if not name.startswith(FILES_PREFIX):
            storage.delete(f"{folder}/{name}")
    return committed


def _write_index(storage: Storage, name: str, data: memoryview, generation: int) -> None:
    """Write an index over the one of `generation`. In an object store, which has no locks, another process may have
    replaced that meanwhile: with the same bytes, if it has done the same work.

    Raises:
        UserError: with others.
    """
    if not isinstance(storage, RemoteStorage):
        storage.write(name, data)
        return
    version = storage.version(name)
    found = 0 if version is None else _read_parquet(storage, name, _schema_of(("bucket",), False))[1]["generation"]
    try:
        if found != generation:
            raise ChangedMeanwhileError(name)
        storage.write_if(name, data, version)
    except ChangedMeanwhileError as error:
        if storage.read(name) != bytes(data):
            raise UserError(f"another process has changed {storage.path(name)} meanwhile; stop it, and run the same "
                            "command again") from error


def parquet_bytes(table: pa.Table, raw: Mapping[str, Any] | None = None) -> memoryview:
    """Return a table as the content of a Parquet file, with `raw` as JSON in its metadata."""
    sink = pa.BufferOutputStream()
    metadata = None if raw is None else {METADATA: json.dumps(raw).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return memoryview(sink.getvalue())
