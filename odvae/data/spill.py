"""Records of a source's files, by partition: in a bounded buffer, then on local disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from ..utils.files import path_text
from ..utils.temporary import temporary_folder

BUFFER = 2**17  # records in memory
BUCKETS = 256  # files that records are written to; a larger number of partitions splits them when they are read
SKETCH = 2**16  # hashes that are kept to count distinct files; up to so many the count is exact


class Record(NamedTuple):
    """A file of a source, or a time span of it, as it was listed: nothing has been read of it."""

    name: str  # of `MediaRef`; as a folder lists it, of a file of which it is not known yet whether it is read
    path: str | None = None  # a local file or a URL; None: `name` in the folder that is listed
    version_tag: str | None = None  # None: not known without asking for this file
    offset: int = 0
    size: int | None = None  # bytes of a member of a tar
    column: str | None = None
    start: float = 0.0  # s
    end: float = math.inf  # s
    captions: tuple[str, ...] | None = None
    title: str | None = None  # the text from which a caption is made if there is no other
    role: Literal["named", "text"] | None = None  # a mere note: metadata names it; or only its text may be of use
    caption_error: tuple[str, str] | None = None  # reason and advice, of a caption that could not be read


_TEXT, _BYTES = pa.list_(pa.string()), pa.binary()
SCHEMA = pa.schema([
    ("name", _BYTES), ("path", _BYTES), ("version_tag", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
    ("column", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("captions", _TEXT), ("title", _BYTES),
    ("role", pa.string()), ("caption_error", _TEXT)])
NUMBERS = [("hash", pa.uint64()), ("position", pa.int64())]


def partition_hash(name: str) -> int:
    """Return the hash of a source's file that decides about its partition. A video and its .txt have the same, and so
    have all members of a tar or of a Parquet file."""
    container, inside, _ = name.partition("::")
    folder, slash, last = container.rpartition("/")
    key = container if inside else f"{folder}{slash}{last.rpartition('.')[0] or last}"
    return int.from_bytes(hashlib.sha256(path_text(key).encode()).digest()[:8], "big")


class Spill:
    """Holds records, of which one partition is read at a time. Used as a context: its files are removed at the end.

    Attributes:
        count: of the records.
    """

    def __init__(self) -> None:
        self.count = 0
        self._buffer: list[tuple[int, int, Record]] = []  # hash, position, record
        self._folder: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, record: Record, key: int) -> None:
        """Add a record; `key` is its `partition_hash`."""
        self._buffer.append((key, self.count, record))
        self.count += 1
        if len(self._buffer) >= BUFFER:
            self._flush()

    def read(self, number: int, count: int) -> list[Record]:
        """Return the records of partition `number` of `count` (a power of two), in the order in which they came."""
        found = [(position, record) for key, position, record in self._buffer if key % count == number]
        if self._folder is not None:
            for table in self._tables(number, count):
                mask = table["hash"].to_numpy() % count == number
                found += _decode(table if mask.all() else table.filter(pa.array(mask)))
        found.sort(key=lambda pair: pair[0])
        return [record for _, record in found]

    def _tables(self, number: int, count: int) -> Iterator[pa.Table]:
        """Yield tables that together hold all records of a partition on disk."""
        if count <= BUCKETS:
            for bucket in range(number, BUCKETS, count):
                yield from _read_tables(self._path(bucket, BUCKETS))
            return
        source, target = self._path(number % BUCKETS, BUCKETS), self._path(number, count)
        if source.exists():
            _write_parts(pa.concat_tables(_read_tables(source)), count, lambda part: self._path(part, count))
            source.unlink()
        yield from _read_tables(target)

    def _flush(self) -> None:
        if self._folder is None:
            self._folder = self._stack.enter_context(temporary_folder("odvae-listing-"))
        _write_parts(_encode_records(self._buffer), BUCKETS, lambda bucket: self._path(bucket, BUCKETS))
        self._buffer = []

    def _path(self, number: int, count: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}-of-{count}.arrow"


class DistinctCount:
    """Counts distinct names in constant memory: exactly up to `SKETCH`, then by the density of the smallest hashes to
    about .4 %. The same names give the same count in every process."""

    def __init__(self) -> None:
        self._smallest = np.zeros(0, np.uint64)
        self._new: list[int] = []
        self._last = ""

    def add(self, name: str) -> None:
        if name != self._last:
            self._last = name
            self._new.append(int.from_bytes(hashlib.blake2b(_encode(name), digest_size=8).digest(), "big"))
            if len(self._new) >= SKETCH:
                self._merge()

    def __int__(self) -> int:
        self._merge()
        if len(self._smallest) < SKETCH:
            return len(self._smallest)
        return round((SKETCH - 1) / (int(self._smallest[-1]) / 2**64))

    def _merge(self) -> None:
        self._smallest = np.union1d(self._smallest, np.array(self._new, np.uint64))[:SKETCH]
        self._new = []


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # names of bytes that are not UTF-8 come back as they were


def _decode_text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogatepass")


def _encode_records(buffer: Sequence[tuple[int, int, Record]]) -> pa.Table:
    keys, positions, records = zip(*buffer, strict=True)
    columns: dict[str, Any] = {}
    for field, values in zip(SCHEMA, zip(*records, strict=True), strict=True):
        texts = [value if value is None else _encode(value) for value in values] if field.type == _BYTES else values
        columns[field.name] = pa.array(texts, field.type)
    for (name, dtype), values in zip(NUMBERS, (keys, positions), strict=True):
        columns[name] = pa.array(values, dtype)
    return pa.table(columns)


def _decode(table: pa.Table) -> Iterator[tuple[int, Record]]:
    columns = []
    for field in SCHEMA:
        values = table[field.name].to_pylist()
        if field.type == _BYTES:
            values = list(map(_decode_text, values))
        elif field.type == _TEXT:
            values = [value if value is None else tuple(value) for value in values]
        columns.append(values)
    return zip(table["position"].to_pylist(), map(Record._make, zip(*columns, strict=True)), strict=True)


def _write_parts(table: pa.Table, count: int, path_of: Callable[[int], Path]) -> None:
    """Append the rows of a table to the files of their parts, by hash modulo `count`."""
    parts = (table["hash"].to_numpy() % count).astype(np.int64)
    order = np.argsort(parts, kind="stable")
    table, (numbers, first) = table.take(pa.array(order)), np.unique(parts[order], return_index=True)
    for number, begin, end in zip(numbers.tolist(), first, [*first[1:], len(order)], strict=True):
        with open(path_of(number), "ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(begin, end - begin).combine_chunks())


def _read_tables(path: Path) -> list[pa.Table]:
    """Read all that was appended to a file; [] if there is none."""
    tables = []
    if path.exists():
        with pa.OSFile(str(path)) as file:
            while file.tell() < file.size():
                with pa.ipc.open_stream(file) as stream:
                    tables.append(stream.read_all())
    return tables
