"""Videos as bytes in a Parquet file: in a column of bytes, or of {bytes, path} as Hugging Face's datasets have them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

READ = 2**20  # bytes of a column chunk that are read at once, in place of all of it


def open_parquet(file: IO[bytes]) -> pq.ParquetFile:
    """Such that no more of a column of videos lies in memory than the page that is read."""
    return pq.ParquetFile(file, buffer_size=READ, pre_buffer=False)


def bytes_column(schema: pa.Schema, column: str) -> str | None:
    """The path in the schema of the bytes of a column; None where it holds none."""
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return f"{column}.bytes" if kind.get_field_index("bytes") >= 0 else None
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def rows_with_bytes(file: pq.ParquetFile, stored: str) -> list[bool]:
    """Which rows hold a file's bytes in the column `stored` (the others have a path). Bytes are read only where the
    file does not say how many of a row group are null."""
    found: list[bool] = []
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        columns = [about.column(i) for i in range(about.num_columns)]
        statistics = next(one.statistics for one in columns if one.path_in_schema == stored)
        if statistics is not None and statistics.has_null_count and statistics.null_count in (0, about.num_rows):
            found += [statistics.null_count == 0] * about.num_rows
        else:
            found += [_value(batch) is not None for batch in _batches(file, group, stored)]
    return found


def read_cell(file: Any, path: str, version_tag: str, stored: str, row: int) -> bytes:
    """The bytes of one row. Rows in rising order cost one pass over a file, whatever the size of its row groups.

    Args:
        file: opens `path`; called only for another file than the last one.
        stamp: of the file: another one, and it is opened anew.

    Raises:
        OSError, ArrowException: the file has changed or is damaged.
    """
    with _LOCK:
        try:
            return _reader(file, path, version_tag, stored).read(row)
        except Exception:
            _reader.cache_clear()  # pyarrow's iterator ends at an error: the next try opens the file anew
            raise


_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _reader(file: Any, path: str, version_tag: str, stored: str) -> _Cells:
    return _Cells(file(path), stored)


class _Cells:
    """The bytes in a column, one after the other."""

    def __init__(self, file: IO[bytes], stored: str) -> None:
        self._file, self._stored = open_parquet(file), stored
        self._group, self._next = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes:
        group, first = 0, 0
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        while group < len(sizes) and row >= first + sizes[group]:
            first, group = first + sizes[group], group + 1
        if group == len(sizes):
            raise OSError("the row that held the video is not there any more")
        if group != self._group or row - first < self._next:
            self._batches, self._group, self._next = _batches(self._file, group, self._stored), group, 0
        batch = None
        while self._next <= row - first:
            batch, self._next = next(self._batches), self._next + 1
        data = _value(batch)
        if data is None:
            raise OSError("the row holds no video any more")
        return data


def _batches(file: pq.ParquetFile, group: int, stored: str) -> Iterator[pa.RecordBatch]:
    """Of one row each: several videos need not fit into memory."""
    found: Iterator[pa.RecordBatch] = file.iter_batches(1, row_groups=[group], columns=[stored], use_threads=False)
    return found


def _value(batch: pa.RecordBatch) -> bytes | None:
    found = batch.column(0)[0].as_py()
    data: bytes | None = found["bytes"] if isinstance(found, dict) else found
    return data
