"""Lists of clips in a file: JSONL, CSV or Parquet with a column `path` and, where wanted, `caption`, `start`, `end`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pyarrow
import pyarrow.parquet

from ..runtime.errors import UserError
from .clips import Listed, list_folder

COLUMNS = ("path", "caption", "start", "end")


def list_clips(source: Path | str, images: bool = False) -> list[Listed]:
    """What a folder holds (with the folders below it; the photos too, where asked), or what a list names.

    Raises:
        UserError: as `list_folder` and `read_list`.
    """
    source = Path(source)
    return read_list(source) if is_list(source) else list_folder(source, images)


def is_list(path: PurePath) -> bool:
    """By its name, and a folder is none."""
    return path.suffix.lower() in READERS and not (isinstance(path, Path) and path.is_dir())


def read_list(path: Path | str) -> list[Listed]:
    """The rows of a list, in order. A path in it is relative to the list's folder. Raises UserError as `read_rows`."""
    return [Listed(Path(path).parent / row.path, row.start, row.end, row.caption) for row in read_rows(path)]


@dataclass(frozen=True)
class Row:
    """One row of a list, as it stands there."""

    path: str
    start: float = 0.0  # s
    end: float = math.inf  # s
    caption: str | None = None


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a list, in order; columns that are not known are left alone.

    Raises:
        UserError: no such file or format, no rows, a row without a path, times that are no numbers or out of order;
            naming the row (from 1, without CSV's header).
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is no list of clips that can be read; give a file {', '.join(READERS)}")
    try:
        rows = READERS[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the list {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"the list {path} has no rows")
    return [_row(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def _csv(path: Path) -> list[Mapping[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]  # it has no null


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    there = pyarrow.parquet.read_schema(path).names
    rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(
        path, columns=[name for name in COLUMNS if name in there]).to_pylist()
    return rows


READERS: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {
    ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping) or not row.get("path"):
        raise UserError(f"{where} has no `path`; every row needs one, the other columns are {', '.join(COLUMNS[1:])}")
    start, end = (_seconds(row.get(name), default, f"{where}: {name}")
                  for name, default in (("start", 0.0), ("end", math.inf)))
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start:g} and end {end:g} must be seconds with 0 <= start < end")
    caption = row.get("caption")
    return Row(str(row["path"]), start, end, None if caption is None else str(caption))


def _seconds(value: Any, default: float, where: str) -> float:
    if value is None or value == "":
        return default
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {value!r}, not a number of seconds") from error
