"""Read lists of clips (manifests): JSONL, CSV or Parquet, with a column for the path and optional ones for captions,
`start` and `end`. A Parquet file may also hold the videos themselves."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import pyarrow as pa

from ..utils.errors import UserError
from .parquet import bytes_column, open_parquet, rows_with_bytes

logger = logging.getLogger("odvae")

COLUMNS = ("path", "caption", "start", "end")
DEFAULT_NAMES = {"path": ("path", "file_name"), "caption": ("caption",), "start": ("start",), "end": ("end",)}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the list of the files in a folder


@dataclass(frozen=True)
class ManifestRow:
    """One row of a list, as read."""

    path: str  # "" for bytes without a name
    start: float = 0.0  # s
    end: float = math.inf  # s
    captions: tuple[str, ...] | None = None  # None: the file's own
    cell: tuple[str, int] | None = None  # column and row number of the file's bytes in the Parquet file


@dataclass(frozen=True)
class ClipRef:
    """A file, or a time span of it, from a folder or a list."""

    path: Path
    start: float = 0.0  # s
    end: float = math.inf  # s


def is_manifest(path: PurePath) -> bool:
    """Return whether a path is a list of clips, by its extension; a folder is not."""
    return path.suffix.lower() in READERS and not (isinstance(path, Path) and path.is_dir())


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Parse ["path=video", "caption=text"] to {"path": "video", "caption": "text"}. Raises UserError."""
    names: dict[str, str] = {}
    for text in columns:
        field, equals, name = text.partition("=")
        if field not in COLUMNS or not equals or not name or field in names:
            raise UserError(f"columns: {text!r} must be one of {', '.join(COLUMNS)}, each once, then = and the list's "
                            "name for it, such as path=video")
        names[field] = name
    return names


def read_manifest(path: Path | str, columns: Sequence[str] = ()) -> list[ClipRef]:
    """Read the files that a list names, in order. Relative paths are relative to the list's folder.

    Raises:
        UserError: as `read_rows`; and for a list that holds the videos' bytes.
    """
    rows = read_rows(path, columns)
    if any(row.cell is not None for row in rows):
        raise UserError(f"{path} holds videos as bytes, which only `odvae cache build` reads; write the videos to "
                        "files and list their paths")
    return [ClipRef(Path(path).parent / row.path, row.start, row.end) for row in rows]


def read_rows(path: Path | str, columns: Sequence[str] = (), file: IO[bytes] | None = None) -> list[ManifestRow]:
    """Read the rows of a list, in order; unknown columns are ignored.

    Args:
        columns: column names that differ from `DEFAULT_NAMES`, as `parse_columns` takes them.
        file: to read from; None: the file at `path`. Its OSErrors are not converted.

    Raises:
        UserError: no such file, format or column, no rows, a row without a path, captions that are not text, times that
            are not numbers or out of order; naming the row (from 1, without CSV's header).
    """
    requested, suffix = parse_columns(columns), PurePath(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path} is not a readable list of clips; give a file {', '.join(READERS)}")
    try:
        if file is None:
            with open(path, "rb") as opened:
                names, rows = READERS[suffix](opened, str(path), requested)
        else:
            names, rows = READERS[suffix](file, str(path), requested)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError) or (file is not None and isinstance(error, OSError)):
            raise
        raise UserError(f"cannot read the list {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"the list {path} has no rows")
    return [_row(row, names, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _read_jsonl(file: IO[bytes], name: str, requested: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    rows: list[Any] = []
    # Lines end at \n alone: JSON allows U+2028 and the like inside strings, where str.splitlines would split.
    for number, line in enumerate(file.read().decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{name}, line {number} is not JSON: {error}") from error
    keys = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    return _column_names(keys, requested, name) if rows else {}, rows


def _read_csv(file: IO[bytes], name: str, requested: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    lines = csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline=""))
    header = [cell.strip() for cell in next(lines, [])]
    if duplicates := [cell for cell in header if cell and header.count(cell) > 1]:
        raise UserError(f"{name} has several columns named {duplicates[0]!r}; rename one of them")
    rows: list[Any] = []
    for cells in lines:
        if not cells:
            continue
        if len(cells) > len(header):
            raise UserError(f"{name}, row {len(rows) + 1} has {len(cells)} cells and the header has {len(header)}; "
                            "quote text that contains commas")
        rows.append({key: cell or None for key, cell in zip(header, cells, strict=False)})  # CSV has no null
    return _column_names(header, requested, name), rows


def _read_parquet(file: IO[bytes], name: str, requested: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    with open_parquet(file) as opened:
        schema, count = opened.schema_arrow, opened.metadata.num_rows
        structs = {field.name: f"{field.name} {{{', '.join(part.name for part in field.type)}}}" for field in schema
                   if pa.types.is_struct(field.type)}
        names = _column_names(schema.names, requested, name, structs)
        column = names["path"]
        bytes_path = bytes_column(schema, column)
        has_paths = bytes_path is None and column not in structs
        to_read = [name for field, name in names.items() if field != "path" or has_paths]
        if column in structs and schema.field(column).type.get_field_index("path") >= 0:
            to_read.append(f"{column}.path")
        rows: list[Any] = opened.read(to_read).to_pylist() if to_read else [{} for _ in range(count)]
        has_bytes = [] if bytes_path is None else rows_with_bytes(opened, bytes_path)
    if column in structs:
        rows = [row | {column: (row.get(column) or {}).get("path")} for row in rows]
    for number in (i for i, stored in enumerate(has_bytes) if stored):
        rows[number] |= {column: rows[number].get(column) or "", CELL: (bytes_path, number)}
    return names, rows


READERS: dict[str, Callable[[IO[bytes], str, Mapping[str, str]], tuple[dict[str, str], list[Any]]]] = {
    ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
CELL = "\0cell"  # no column can have this name


def _column_names(columns: Sequence[str], requested: Mapping[str, str], where: str,
                  descriptions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the list's name for each of `COLUMNS` that it has. Raises UserError if a requested one, or the path, is
    missing."""
    described = ", ".join((descriptions or {}).get(name, name) for name in columns) or "none"
    names: dict[str, str] = {}
    for field, defaults in DEFAULT_NAMES.items():
        candidates = (requested[field],) if field in requested else defaults
        name = next((name for name in candidates if name in columns), None)
        if name is not None:
            names[field] = name
        elif field in requested or field == "path":
            raise UserError(f"{where} has no column `{'` or `'.join(candidates)}`; its columns are {described}. Map "
                            "them with --columns path=NAME caption=NAME (in a training config, data.columns)")
    if "caption" not in names and len(columns) > len(names):
        logger.warning("%s has no column `caption`, and its columns are %s: captions are taken from .txt files or "
                       "file names. --columns caption=NAME takes another column", where, described)
    return names


def _row(row: Any, names: Mapping[str, str], where: str) -> ManifestRow:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not a JSON object")
    values = {field: None if _is_nan(value := row.get(name)) else value for field, name in names.items()}
    path, cell = values.get("path"), row.get(CELL)
    if not path and cell is None:
        raise UserError(f"{where} has no `{names.get('path', 'path')}`; every row needs one")
    if not isinstance(path, str):
        raise UserError(f"{where}: the path is {_abbreviate(path)}, and must be text")
    start, end = (_seconds(values.get(name), default, f"{where}: {name}")
                  for name, default in (("start", 0.0), ("end", math.inf)))
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start:g} and end {end:g} must be seconds with 0 <= start < end")
    return ManifestRow(path, start, end, parse_captions(values.get("caption"), where), cell)


def parse_captions(value: Any, where: str) -> tuple[str, ...] | None:
    """Return the captions in a value: text, or a list of texts; None for null and an empty list. Raises UserError."""
    if value is None or _is_nan(value) or value == []:
        return None
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{where}: the caption is {_abbreviate(value)}; it must be text, or a list of texts of "
                            "which training draws one each time")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: the caption {caption!a} has half of a surrogate pair; write the whole "
                            "character") from error
    return tuple(captions)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _seconds(value: Any, default: float, where: str) -> float:
    if value is None or value == "":
        return default
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is {value!r}, not a number of seconds") from error
