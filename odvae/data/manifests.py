"""Read lists of clips (manifests): JSONL, CSV or Parquet, with a column for the path and optional ones for captions,
`start` and `end`. A Parquet file may also hold the videos themselves."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..utils.errors import UserError
from .parquet import bytes_column, open_parquet, rows_with_bytes

logger = logging.getLogger("odvae")

COLUMNS = ("path", "caption", "start", "end")
DEFAULT_NAMES = {"path": ("path", "file_name"), "caption": ("caption",), "start": ("start",), "end": ("end",)}
BATCH = 4096  # rows of a Parquet file that are read at once
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
    """Return the rows of a list as a list, see `iter_rows`."""
    return list(iter_rows(path, columns, file))


def iter_rows(path: Path | str, columns: Sequence[str] = (), file: IO[bytes] | None = None) -> Iterator[ManifestRow]:
    """Read the rows of a list, in order; unknown columns are ignored. A few thousand rows are in memory at a time.

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
    number = 0
    try:
        with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
            for number, (names, row) in enumerate(READERS[suffix](opened, str(path), requested), 1):
                yield _row(row, names, f"{path}, row {number}")
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError) or (file is not None and isinstance(error, OSError)):
            raise
        raise UserError(f"cannot read the list {path}: {getattr(error, 'strerror', None) or error}") from error
    if not number:
        raise UserError(f"the list {path} has no rows")


NamedRow = tuple[Mapping[str, str], Any]  # the list's name for each of `COLUMNS` that it has, and a row


def _read_jsonl(file: IO[bytes], name: str, requested: Mapping[str, str]) -> Iterator[NamedRow]:
    """Yield the rows of JSONL. Its columns are the keys of all rows, and are known only at its end."""
    keys, names, path = dict[str, None](), dict[str, str](), None
    rows = _json_lines(file, name)
    for row in rows:
        if isinstance(row, dict) and not row.keys() <= keys.keys():
            keys |= dict.fromkeys(row)
            names = _known_names(keys, requested)
            if path is None or path != names["path"]:
                _check_path(rows, keys, requested, name, path)
                path = names["path"]
        yield names, row
    if keys:
        _column_names(list(keys), requested, name)


def _check_path(rows: Iterable[Any], keys: dict[str, None], requested: Mapping[str, str], name: str,
                path: str | None) -> None:
    """Raise UserError unless the rows so far have one column of paths; the rest is read to say which columns there
    are."""
    found = _known_names(keys, requested).get("path")
    if found is None or path is not None:
        keys |= dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
        found = _column_names(list(keys), requested, name)["path"]
        raise UserError(f"{name}, row 1 has no `{found}`; every row needs one")


def _json_lines(file: IO[bytes], name: str) -> Iterator[Any]:
    # Lines end at \n alone: JSON allows U+2028 and the like inside strings, where str.splitlines would split.
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            try:
                yield json.loads(text)
            except ValueError as error:
                raise UserError(f"{name}, line {number} is not JSON: {error}") from error


def _read_csv(file: IO[bytes], name: str, requested: Mapping[str, str]) -> Iterator[NamedRow]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        lines = csv.reader(text)
        header = [cell.strip() for cell in next(lines, [])]
        if duplicates := [cell for cell in header if cell and header.count(cell) > 1]:
            raise UserError(f"{name} has several columns named {duplicates[0]!r}; rename one of them")
        names, number = _column_names(header, requested, name), 0
        for cells in lines:
            number += bool(cells)
            if len(cells) > len(header):
                raise UserError(f"{name}, row {number} has {len(cells)} cells and the header has {len(header)}; "
                                "quote text that contains commas")
            if cells:
                yield names, {key: cell or None for key, cell in zip(header, cells, strict=False)}  # CSV has no null
    finally:
        text.detach()  # the caller closes the file


def _read_parquet(file: IO[bytes], name: str, requested: Mapping[str, str]) -> Iterator[NamedRow]:
    with open_parquet(file) as opened:
        schema = opened.schema_arrow
        structs = {field.name: f"{field.name} {{{', '.join(part.name for part in field.type)}}}" for field in schema
                   if pa.types.is_struct(field.type)}
        names = _column_names(schema.names, requested, name, structs)
        column = names["path"]
        bytes_path = bytes_column(schema, column)
        has_paths = bytes_path is None and column not in structs
        to_read = [name for field, name in names.items() if field != "path" or has_paths]
        if column in structs and schema.field(column).type.get_field_index("path") >= 0:
            to_read.append(f"{column}.path")
        number = 0
        for group in range(opened.num_row_groups):
            stored = iter(()) if bytes_path is None else rows_with_bytes(opened, group, bytes_path)
            for row in _group_rows(opened, group, to_read):
                if column in structs:
                    row |= {column: (row.get(column) or {}).get("path")}
                if next(stored, False):
                    row |= {column: row.get(column) or "", CELL: (bytes_path, number)}
                number += 1
                yield names, row


def _group_rows(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.row_group(group).num_rows))
        return
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=list(columns)):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[IO[bytes], str, Mapping[str, str]], Iterator[NamedRow]]] = {
    ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
CELL = "\0cell"  # no column can have this name


def _column_names(columns: Sequence[str], requested: Mapping[str, str], where: str,
                  descriptions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the list's name for each of `COLUMNS` that it has. Raises UserError if a requested one, or the path, is
    missing."""
    described = ", ".join((descriptions or {}).get(name, name) for name in columns) or "none"
    names = _known_names(columns, requested)
    for field, defaults in DEFAULT_NAMES.items():
        candidates = (requested[field],) if field in requested else defaults
        if field not in names and (field in requested or field == "path"):
            raise UserError(f"{where} has no column `{'` or `'.join(candidates)}`; its columns are {described}. Map "
                            "them with --columns path=NAME caption=NAME (in a training config, data.columns)")
    if "caption" not in names and len(columns) > len(names):
        logger.warning("%s has no column `caption`, and its columns are %s: captions are taken from .txt files or "
                       "file names. --columns caption=NAME takes another column", where, described)
    return names


def _known_names(columns: Container[str], requested: Mapping[str, str]) -> dict[str, str]:
    """Return the list's name for each of `COLUMNS` that is among its columns."""
    found = {field: next((name for name in ((requested[field],) if field in requested else defaults)
                          if name in columns), None) for field, defaults in DEFAULT_NAMES.items()}
    return {field: name for field, name in found.items() if name is not None}


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
