"""SQL over a cache, by DuckDB, which reads the columns and partitions that a query needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ...data.failures import cache_file_error
from ...utils.errors import UserError
from ...utils.files import atomic_path
from ...utils.storage import LocalStorage, Storage, open_storage
from .. import format as fmt
from ..partition import INDEX, folder_of, partition_numbers, read_partition
from .rejects import read_rejects

MAX_ROWS = 100  # rows of a query's result that are shown
MAX_BATCH = 65536  # rows of a result that are in memory at once
FORMATS = (".csv", ".parquet", ".jsonl")


def query(path: Path | str, sql: str, out: Path | None = None) -> list[str]:
    """Run SQL over `clips` and `rejects`; the result as lines, or in a file. In addition to the columns of
    `format.SCHEMA`, `clips` has `caption`: a clip's captions, one per line.

    Raises:
        UserError: SQL that cannot be run, a file name with another suffix.
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} is none of .csv, .parquet and .jsonl")
    with run_query(path, sql) as reader:
        if out is not None:
            return [f"{_write(reader, out)} rows in {out}"]
        shown, total = list[dict[str, Any]](), 0
        for batch in reader:
            shown += batch.slice(0, MAX_ROWS - len(shown)).to_pylist() if len(shown) < MAX_ROWS else []
            total += len(batch)
        names = reader.schema.names
    rows = [names, *([_format_cell(value) for value in row.values()] for row in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"... {total - MAX_ROWS} more rows; --out FILE writes all"] * (total > MAX_ROWS)


@contextmanager
def run_query(path: Path | str, sql: str) -> Iterator[pa.RecordBatchReader]:
    """Run SQL as for `query`, and yield the result in batches."""
    try:
        import duckdb
    except ImportError as error:
        raise UserError("queries need DuckDB: pip install 'odvae-lvdm[query]'") from error
    storage = open_storage(path)
    fmt.read_header(storage)
    committed, uncommitted = _clips(storage)
    with duckdb.connect() as connection:
        connection.register("committed", committed)
        connection.register("uncommitted", uncommitted)
        connection.execute("create view clips as select *, array_to_string(captions, chr(10)) as caption from "
                           "(select * from committed union all select * from uncommitted)")
        connection.register("rejects", read_rejects(path))
        connection.execute("set enable_external_access = false")
        try:
            result = connection.sql(sql)
            if result is None:
                raise UserError("the query has no result; begin it with select")
            yield result.to_arrow_reader(MAX_BATCH)
        except duckdb.Error as error:
            raise UserError(f"the query cannot be run: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise cache_file_error(error, storage.path("partitions"), "run `odvae cache verify`") from error


def _clips(storage: Storage) -> tuple[Any, pa.Table]:
    """Return the rows of all indices, unread, and those of partitions that a build has not committed yet. An index is
    replaced as a whole, so that a running build does no harm."""
    files, tables, clips = list[str](), [fmt.SCHEMA.empty_table()], 0
    for number in partition_numbers(storage):
        partition = read_partition(storage, number, ())
        clips += sum(shard.clips for shard in partition.with_uncommitted().shards)
        if partition.uncommitted:
            tables.append(read_partition(storage, number).with_uncommitted().table)
        elif partition.shards:
            files.append(f"{folder_of(number)}/{INDEX}")
    if not clips:
        raise UserError(f"{storage.root} has no clips yet; finish it with `odvae cache build`")
    committed: Any = fmt.SCHEMA.empty_table()
    if files and isinstance(storage, LocalStorage):
        committed = ds.dataset([str(storage.folder / name) for name in files], fmt.SCHEMA, format="parquet")
    elif files:
        tables += [read_partition(storage, int(name.split("/")[1])).table for name in files]
    return committed, pa.concat_tables(tables)


def _write(reader: pa.RecordBatchReader, out: Path) -> int:
    """Write a result batch by batch; returns the number of rows."""
    rows, suffix, schema = 0, out.suffix.lower(), reader.schema
    with atomic_path(out) as temporary:
        if suffix == ".jsonl":
            with open(temporary, "w", encoding="utf-8") as file:
                for batch in reader:
                    file.writelines(json.dumps(row, default=str) + "\n" for row in batch.to_pylist())
                    rows += len(batch)
            return rows
        is_csv = suffix == ".csv"
        schema = _without_lists(schema.empty_table()).schema if is_csv else schema
        writer = pyarrow.csv.CSVWriter(temporary, schema) if is_csv else pq.ParquetWriter(temporary, schema)
        with writer:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                writer.write_table(_without_lists(table) if is_csv else table)
                rows += len(batch)
    return rows


def _without_lists(table: pa.Table) -> pa.Table:
    """Convert lists to JSON text, for CSV."""
    for number, column in enumerate(table.schema):
        if pa.types.is_nested(column.type):
            text = [None if value is None else json.dumps(value, ensure_ascii=False) for value in
                    table[number].to_pylist()]
            table = table.set_column(number, column.name, pa.array(text, pa.string()))
    return table


def _format_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
