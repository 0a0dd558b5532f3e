"""Probe the files of a partition: each is read once, and again if it changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.failures import cache_file_error, is_recorded, is_still_valid, to_video_error
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.progress import bar
from ...utils.storage import Storage
from ..partition import FILES, FILES_PREFIX, folder_of, parquet_bytes
from .decode_worker import MediaInfo

CHUNK = 128  # files after which results are written

SCHEMA = pa.schema([
    ("key", pa.string()),  # see `_key`
    ("content", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("frames", pa.int32()),
    ("duration", pa.float64()), ("readable", pa.int32()), ("cuts", pa.list_(pa.float64())),
    ("notes", pa.list_(pa.string())),
    ("kind", pa.string()), ("reason", pa.string()), ("advice", pa.string()),  # of an unusable file
    ("limit", pa.float64()),  # s that it was allowed to take
])
INFO = tuple(field.name for field in dataclasses.fields(MediaInfo))
ERROR = ("reason", "advice", "kind")  # of a `VideoError`
ProbeResults = dict[MediaRef, MediaInfo | VideoError]


def probe_files(refs: Iterable[MediaRef], storage: Storage, number: int,
                probe: Callable[[Sequence[MediaRef]], Iterator[MediaInfo | VideoError]], *, seconds: float,
                keep_truncated: bool = False, scenes: bool = False, retry: bool = False,
                show: bool = True) -> ProbeResults:
    """Return what is known of files of a partition; files that were not probed before are probed now.

    A transient failure (`failures.KINDS`) says nothing about the file, and is not recorded: the next build probes the
    file again.

    Args:
        probe: returns the results for files, in order; with these `keep_truncated` and `scenes`.
        seconds: that a file may take. A timeout under a lower limit is ignored.
        retry: probe the files again that could not be used.
        show: a progress bar.
    """
    refs = list(dict.fromkeys(refs))
    options = _options(keep_truncated, scenes)
    keys = {ref: _key(ref, options) for ref in refs}
    records = _Records(storage, number)
    known: dict[str, MediaInfo | VideoError] = {key: result for key, (result, limit) in records.results.items()
                                                if isinstance(result, MediaInfo) or
                                                (not retry and is_still_valid(result.kind, limit, seconds))}
    missing = [ref for ref in refs if keys[ref] not in known]
    with bar(len(missing), "probe files", "file", disable=not (missing and show)) as progress:
        lasting: dict[str, tuple[MediaInfo | VideoError, float]] = {}
        for number_done, (ref, result) in enumerate(zip(missing, probe(missing), strict=True), 1):
            known[keys[ref]] = result
            if ref.version_tag and (isinstance(result, MediaInfo) or is_recorded(result.kind)):
                lasting[keys[ref]] = result, seconds
            if number_done % CHUNK == 0 or number_done == len(missing):
                records.add(lasting)
                lasting = {}
            progress.update(1)
    records.compact()
    return {ref: known[keys[ref]] for ref in refs}


def known_contents(refs: Iterable[MediaRef], storage: Storage, number: int) -> dict[MediaRef, str]:
    """Return the SHA-256 of the files of a partition that were probed before, with any options, and have not changed
    since."""
    known = _Records(storage, number).results
    contents = {}
    for ref in refs:
        results = [known[key][0] for flags in product((False, True), repeat=2)
                   if ref.version_tag and (key := _key(ref, _options(*flags))) in known]
        content = next((result.content for result in results if isinstance(result, MediaInfo)), None)
        if content is not None:
            contents[ref] = content
    return contents


def _options(keep_truncated: bool, scenes: bool) -> str:
    return json.dumps([keep_truncated, scenes])


def _key(ref: MediaRef, options: str) -> str:
    path = ref.path if is_url(ref.path) else os.path.abspath(ref.path)
    identity = [path, ref.offset, ref.column, ref.version_tag, options]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


class _Records:
    """The probe results of a partition: `FILES`, and until it is written again a file for each chunk of results.

    Attributes:
        results: by `_key`, with the limit in s under which each was probed.
    """

    def __init__(self, storage: Storage, number: int) -> None:
        self._storage, self._folder = storage, folder_of(number)
        self._chunks = [name for name in storage.sizes(self._folder) if name.startswith(FILES_PREFIX)]
        self.results: dict[str, tuple[MediaInfo | VideoError, float]] = {}
        for name in [FILES, *self._chunks]:
            self.results |= self._read(f"{self._folder}/{name}")

    def add(self, results: dict[str, tuple[MediaInfo | VideoError, float]]) -> None:
        if results:
            self.results |= results
            data = _encode(results)
            name = f"{FILES_PREFIX}{hashlib.sha256(data).hexdigest()[:16]}.parquet"
            self._storage.write(f"{self._folder}/{name}", data)
            self._chunks.append(name)

    def compact(self) -> None:
        """Move the chunks into `FILES`."""
        if self._chunks:
            self._storage.write(f"{self._folder}/{FILES}", _encode(self.results))
        for name in self._chunks:
            self._storage.delete(f"{self._folder}/{name}")
        self._chunks = []

    def _read(self, name: str) -> dict[str, tuple[MediaInfo | VideoError, float]]:
        """Read a file of records; none if it is damaged: its files are probed again."""
        try:
            with self._storage.open(name) as file:
                table = pq.read_table(file).cast(SCHEMA)
        except FileNotFoundError:
            return {}
        except (pa.ArrowException, ValueError, OSError) as error:
            if is_recorded(to_video_error(error, name).kind):
                self._storage.delete(name)
                return {}
            raise cache_file_error(error, self._storage.path(name), "delete it") from error
        columns = {column: table[column].to_pylist() for column in SCHEMA.names}
        columns |= {column: [tuple(some or ()) for some in columns[column]] for column in ("cuts", "notes")}
        infos = zip(*(columns[column] for column in INFO), strict=True)
        errors = zip(*(columns[column] for column in ERROR), strict=True)
        return {key: (MediaInfo(*info) if error[2] is None else VideoError(*error), limit) for key, info, error, limit
                in zip(columns["key"], infos, errors, columns["limit"], strict=True)}


def _encode(results: dict[str, tuple[MediaInfo | VideoError, float]]) -> memoryview:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for key, (result, limit) in sorted(results.items()):
        columns["key"].append(key)
        columns["limit"].append(limit)
        for names, kind in ((INFO, MediaInfo), (ERROR, VideoError)):
            for name in names:
                columns[name].append(getattr(result, name) if isinstance(result, kind) else None)
    return parquet_bytes(pa.table(columns, schema=SCHEMA))
