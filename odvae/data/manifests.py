"""Lists of clips in a file: JSONL, CSV or Parquet, with a column for the path and, where wanted, others for captions,
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
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # in a folder: the list of its files


@dataclass(frozen=True)
class ManifestRow:
    """One row of a list, as it stands there."""

    path: str  # "" for bytes without a name
    start: float = 0.0  # s
    end: float = math.inf  # s
    captions: tuple[str, ...] | None = None  # none: those that the file has
    cell: tuple[str, int] | None = None  # the file's bytes: their column in the Parquet file, and the row's number


@dataclass(frozen=True)
class ClipRef:
    """A file, or a span of it, of a folder or of a list."""

    path: Path
    start: float = 0.0  # s
    end: float = math.inf  # s


def is_manifest(path: PurePath) -> bool:
    """By its name, and a folder is none."""
    return path.suffix.lower() in READERS and not (isinstance(path, Path) and path.is_dir())


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """["path=video", "caption=text"] as {"path": "video", "caption": "text"}. Raises UserError."""
    found: dict[str, str] = {}
    for one in columns:
        ours, equals, theirs = one.partition("=")
        if ours not in COLUMNS or not equals or not theirs or ours in found:
            raise UserError(f"columns: {one!r} must be one of {', '.join(COLUMNS)}, each once, then = and the list's "
                            "name for it, such as path=video")
        found[ours] = theirs
    return found


def read_manifest(path: Path | str, columns: Sequence[str] = ()) -> list[ClipRef]:
    """The files that a list names, in order, to be read as files. A path in it is relative to the list's folder.

    Raises:
        UserError: as `read_rows`; and for a list that holds the videos' bytes.
    """
    rows = read_rows(path, columns)
    if any(row.cell is not None for row in rows):
        raise UserError(f"{path} holds videos as bytes, which `odvae cache build` reads; here a list must name files: "
                        "write the videos to files first")
    return [ClipRef(Path(path).parent / row.path, row.start, row.end) for row in rows]


def read_rows(path: Path | str, columns: Sequence[str] = (), file: IO[bytes] | None = None) -> list[ManifestRow]:
    """The rows of a list, in order; columns that are not known are left alone.

    Args:
        columns: which column is which, as `parse_columns` takes it, where names differ from `DEFAULT_NAMES`.
        file: what to read from; None: the file at `path`. Its own errors are raised as they are.

    Raises:
        UserError: no such file, format or column, no rows, a row without a path, captions that are no text, times that
            are no numbers or out of order; naming the row (from 1, without CSV's header).
    """
    asked, suffix = parse_columns(columns), PurePath(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path} is no list of clips that can be read; give a file {', '.join(READERS)}")
    try:
        if file is None:
            with open(path, "rb") as opened:
                names, rows = READERS[suffix](opened, str(path), asked)
        else:
            names, rows = READERS[suffix](file, str(path), asked)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError) or (file is not None and isinstance(error, OSError)):
            raise
        raise UserError(f"cannot read the list {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"the list {path} has no rows")
    return [_row(row, names, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _jsonl(file: IO[bytes], name: str, asked: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    rows: list[Any] = []
    # Lines end at \n alone: JSON allows U+2028 and the like inside strings, where str.splitlines would cut.
    for number, line in enumerate(file.read().decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{name}, line {number} is not JSON: {error}") from error
    keys = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    return _names(keys, asked, name) if rows else {}, rows


def _csv(file: IO[bytes], name: str, asked: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    lines = csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline=""))
    header = [cell.strip() for cell in next(lines, [])]
    if twice := [cell for cell in header if cell and header.count(cell) > 1]:
        raise UserError(f"{name} has several columns of the name {twice[0]!r}; rename one of them")
    rows: list[Any] = []
    for cells in lines:
        if not cells:
            continue
        if len(cells) > len(header):
            raise UserError(f"{name}, row {len(rows) + 1} has {len(cells)} cells and the header has {len(header)}; put "
                            "text with commas between quotes")
        rows.append({key: cell or None for key, cell in zip(header, cells, strict=False)})  # CSV has no null
    return _names(header, asked, name), rows


def _parquet(file: IO[bytes], name: str, asked: Mapping[str, str]) -> tuple[dict[str, str], list[Any]]:
    with open_parquet(file) as opened:
        schema, count = opened.schema_arrow, opened.metadata.num_rows
        structs = {one.name: f"{one.name} {{{', '.join(part.name for part in one.type)}}}" for one in schema
                   if pa.types.is_struct(one.type)}
        names = _names(schema.names, asked, name, structs)
        column = names["path"]
        stored = bytes_column(schema, column)
        whole = stored is None and column not in structs  # a column of paths
        plain = [theirs for ours, theirs in names.items() if ours != "path" or whole]
        if column in structs and schema.field(column).type.get_field_index("path") >= 0:
            plain.append(f"{column}.path")
        rows: list[Any] = opened.read(plain).to_pylist() if plain else [{} for _ in range(count)]
        with_bytes = [] if stored is None else rows_with_bytes(opened, stored)
    if column in structs:
        rows = [row | {column: (row.get(column) or {}).get("path")} for row in rows]
    for number in (i for i, there in enumerate(with_bytes) if there):
        rows[number] |= {column: rows[number].get(column) or "", CELL: (stored, number)}
    return names, rows


READERS: dict[str, Callable[[IO[bytes], str, Mapping[str, str]], tuple[dict[str, str], list[Any]]]] = {
    ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
CELL = "\0cell"  # no column can be called this


def _names(found: Sequence[str], asked: Mapping[str, str], where: str,
           shown: Mapping[str, str] | None = None) -> dict[str, str]:
    """The list's name for each of `COLUMNS` that it has. Raises UserError where an asked one, or the path, is not."""
    columns = ", ".join((shown or {}).get(name, name) for name in found) or "none"
    names: dict[str, str] = {}
    for ours, defaults in DEFAULT_NAMES.items():
        wanted = (asked[ours],) if ours in asked else defaults
        there = next((name for name in wanted if name in found), None)
        if there is not None:
            names[ours] = there
        elif ours in asked or ours == "path":
            raise UserError(f"{where} has no column `{'` or `'.join(wanted)}`; its columns are {columns}. Say which is "
                            "which with --columns path=NAME caption=NAME (in a training's config, data.columns)")
    if "caption" not in names and len(found) > len(names):
        logger.warning(
            "%s has no column `caption`, and its columns are %s: captions are those beside the files, or "
            "their names. --columns caption=NAME takes another column",
            where,
            columns,
        )
    return names


def _row(row: Any, names: Mapping[str, str], where: str) -> ManifestRow:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is no object with names and values")
    given = {ours: None if _is_nan(value := row.get(theirs)) else value for ours, theirs in names.items()}
    path, cell = given.get("path"), row.get(CELL)
    if not path and cell is None:
        raise UserError(f"{where} has no `{names.get('path', 'path')}`; every row needs one")
    if not isinstance(path, str):
        raise UserError(f"{where}: the path is {_shown(path)}, and must be text")
    start, end = (_seconds(given.get(name), default, f"{where}: {name}")
                  for name, default in (("start", 0.0), ("end", math.inf)))
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start:g} and end {end:g} must be seconds with 0 <= start < end")
    return ManifestRow(path, start, end, captions_in(given.get("caption"), where), cell)


def captions_in(value: Any, where: str) -> tuple[str, ...] | None:
    """The captions that a value holds: text, or a list of texts; none for null and an empty list. Raises UserError."""
    if value is None or _is_nan(value) or value == []:
        return None
    captions = value if isinstance(value, list) else [value]
    for one in captions:
        if not isinstance(one, str):
            raise UserError(f"{where}: the caption is {_shown(value)}; it must be text, or a list of texts of which a "
                            "training draws one each time")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: the caption {one!a} holds half of a surrogate pair; write the whole character") \
                from error
    return tuple(captions)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
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
