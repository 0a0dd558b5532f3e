"""Read videos stored in a Parquet file: in a column of bytes, or of {bytes, path} as in Hugging Face datasets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

BUFFER_SIZE = 2**20  # bytes of a column chunk that are read at once


def open_parquet(file: IO[bytes]) -> pq.ParquetFile:
    """Open a Parquet file such that only the current page of a column of videos is in memory."""
    return pq.ParquetFile(file, buffer_size=BUFFER_SIZE, pre_buffer=False)


def bytes_column(schema: pa.Schema, column: str) -> str | None:
    """Return the path in the schema of a column's bytes; None if it holds none."""
    dtype = schema.field(column).type
    if pa.types.is_struct(dtype):
        return f"{column}.bytes" if dtype.get_field_index("bytes") >= 0 else None
    return column if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) else None


def rows_with_bytes(file: pq.ParquetFile, group: int, column: str) -> Iterator[bool]:
    """Yield for each row of a row group whether it holds a file's bytes in `column` (the others have a path). Bytes are
    read only if the statistics do not tell."""
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    statistics = next(chunk.statistics for chunk in chunks if chunk.path_in_schema == column)
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, metadata.num_rows):
        yield from (statistics.null_count == 0 for _ in range(metadata.num_rows))
    else:
        yield from (_value(batch) is not None for batch in _batches(file, group, column))


def read_cell(opener: Any, path: str, version_tag: str, column: str, row: int) -> bytes:
    """Return the bytes of one row. Rows in rising order cost one pass over a file, whatever the size of its row groups.

    Args:
        opener: opens `path`; called only if it is not the last file.
        version_tag: of the file; it is opened again if that changes.

    Raises:
        OSError, ArrowException: the file has changed or is damaged.
    """
    with _LOCK:
        try:
            return _reader(opener, path, version_tag, column).read(row)
        except Exception:
            _reader.cache_clear()  # pyarrow's iterator ends at an error: the next try opens the file again
            raise


_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _reader(opener: Any, path: str, version_tag: str, column: str) -> _ColumnReader:
    return _ColumnReader(opener(path), column)


class _ColumnReader:
    """Reads the bytes in a column row by row."""

    def __init__(self, file: IO[bytes], column: str) -> None:
        self._file, self._column = open_parquet(file), column
        self._group, self._next = -1, 0
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes:
        group, first = 0, 0
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        while group < len(sizes) and row >= first + sizes[group]:
            first, group = first + sizes[group], group + 1
        if group == len(sizes):
            raise OSError("the row that held the video no longer exists")
        if group != self._group or row - first < self._next:
            self._batches, self._group, self._next = _batches(self._file, group, self._column), group, 0
        batch = None
        while self._next <= row - first:
            batch, self._next = next(self._batches), self._next + 1
        data = _value(batch)
        if data is None:
            raise OSError("the row no longer holds a video")
        return data


def _batches(file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.RecordBatch]:
    """Yield batches of one row, because several videos need not fit into memory."""
    batches: Iterator[pa.RecordBatch] = file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
    return batches


def _value(batch: pa.RecordBatch) -> bytes | None:
    value = batch.column(0)[0].as_py()
    data: bytes | None = value["bytes"] if isinstance(value, dict) else value
    return data
