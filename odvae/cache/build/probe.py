"""Probe the source's files: each is read once, by the first process that claims it, and again if it changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.failures import is_recorded, is_still_valid, to_video_error
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.progress import bar
from ..lease import BuildLease
from .decode_pool import DecodePool
from .decode_worker import MediaInfo

FILES_A_UNIT = 128  # files that one process claims at a time
WAIT = 0.3  # s between checks of what other processes have done

SCHEMA = pa.schema([
    ("key", pa.string()),  # see `_key`
    ("content", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("frames", pa.int32()),
    ("duration", pa.float64()), ("readable", pa.int32()), ("cuts", pa.list_(pa.float64())),
    ("notes", pa.list_(pa.string())),
    ("kind", pa.string()), ("reason", pa.string()), ("advice", pa.string()),  # of an unusable file
    ("limit", pa.float64()),  # s, of an unusable file: how long it was allowed to take
])
ProbeResults = dict[MediaRef, MediaInfo | VideoError]


def probe_files(refs: Iterable[MediaRef], cache: Path, lease: BuildLease, workers: DecodePool, *,
                keep_truncated: bool = False, scenes: bool = False, retry: bool = False) -> ProbeResults:
    """Probe files, together with the other processes that work in the cache.

    A transient failure (`failures.KINDS`) says nothing about the file: the running processes share it, so that all make
    the same plan, and the next build probes the file again.

    Args:
        keep_truncated, scenes: as for `decode_worker.probe_file`.
        retry: probe the files again that could not be used.
    """
    refs = list(dict.fromkeys(refs))
    keys = {ref: _key(ref, keep_truncated, scenes) for ref in refs}
    records = _Records(cache / "files", lease.shared, workers.seconds)
    known = records.known
    if retry:
        for key in [key for key, result in known.items() if not isinstance(result, MediaInfo)]:
            del known[key]
    # Units by the hash of a name, so that all processes get the same units whenever they start.
    count = -(-len(refs) // FILES_A_UNIT)
    units: dict[str, list[MediaRef]] = {}
    for ref in refs:
        if keys[ref] not in known:
            number = int(hashlib.sha256(ref.name.encode()).hexdigest()[:8], 16) % count
            units.setdefault(f"files-{number}", []).append(ref)

    def probe_one(ref: MediaRef) -> MediaInfo | VideoError:
        try:
            return workers.probe(ref, keep_truncated=keep_truncated, scenes=scenes)
        except VideoError as error:
            return error

    def do(unit: str) -> None:
        records.update()
        rest = [ref for ref in units[unit] if keys[ref] not in known]
        lasting: dict[str, MediaInfo | VideoError] = {}
        transient: dict[str, MediaInfo | VideoError] = {}
        for ref, result in zip(rest, pool.map(probe_one, rest), strict=True):
            is_lasting = ref.version_tag and (isinstance(result, MediaInfo) or is_recorded(result.kind))
            (lasting if is_lasting else transient)[keys[ref]] = result
            progress.update(1)
        progress.update(len(units[unit]) - len(rest))
        records.write(lasting, lease)
        records.write(transient, lease, transient=True)

    def done() -> set[str]:
        records.update()
        return {unit for unit, members in units.items() if all(keys[ref] in known for ref in members)}

    if units:
        with (bar(sum(map(len, units.values())), "probe files", "file") as progress,
              ThreadPoolExecutor(workers.count) as pool):
            try:
                run_shared(list(units), lease, do, done)
            except BaseException:
                workers.cancel_retries()
                raise
    return {ref: known[keys[ref]] for ref in refs}


def known_contents(refs: Iterable[MediaRef], cache: Path) -> dict[MediaRef, str]:
    """Return the SHA-256 of the files that were probed before, with any options, and have not changed since."""
    known = _Records(cache / "files").known
    contents = {}
    for ref in refs:
        infos = (
            [known.get(_key(ref, *flags)) for flags in product((False, True), repeat=2)] if ref.version_tag else []
        )
        content = next((info.content for info in infos if isinstance(info, MediaInfo)), None)
        if content is not None:
            contents[ref] = content
    return contents


def run_shared(
    units: Sequence[str], lease: BuildLease, do: Callable[[str], object], done: Callable[[], set[str]]
) -> None:
    """Do all units of work that no other process does, then wait for the others, and take over from those that die.

    Args:
        do: do one unit, while it is claimed.
        done: return the units that any process has done; called only if another process has claimed one.
    """
    waiting = list(units)
    while waiting:
        waiting = [unit for unit in waiting if not _do_claimed(unit, lease, do)]
        if waiting:
            finished = done()
            waiting = [unit for unit in waiting if unit not in finished]
            time.sleep(WAIT if waiting else 0)


def _do_claimed(unit: str, lease: BuildLease, do: Callable[[str], object]) -> bool:
    """Do a unit of work, unless another process does; returns whether it was done here."""
    if not lease.claim(unit):
        return False
    try:
        do(unit)
    finally:
        lease.release(unit)
    return True


def _key(ref: MediaRef, keep_truncated: bool, scenes: bool) -> str:
    path = ref.path if is_url(ref.path) else os.path.abspath(ref.path)
    identity = [path, ref.offset, ref.column, ref.version_tag, json.dumps([keep_truncated, scenes])]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of records; none if it is damaged: its files are probed again."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).cast(SCHEMA).to_pylist()
    except FileNotFoundError:  # the last process of an earlier build removed it
        return []
    except (pa.ArrowException, ValueError, OSError) as error:
        if is_recorded(to_video_error(error, str(path)).kind):
            path.unlink(missing_ok=True)
        return []
    return rows


class _Records:
    """Probe results, stored in a folder of the cache.

    Args:
        folder: for results that are valid until a file changes.
        transient: folder for results that are valid while processes are running; None: none.
        seconds: that a file may take. A timeout under a lower limit is ignored.

    Attributes:
        known: results by `_key`. If two processes disagree, a usable result wins.
    """

    def __init__(self, folder: Path, transient: Path | None = None, seconds: float = 0.0) -> None:
        self._folder, self._transient, self._seconds = folder, transient, seconds
        self._read: set[Path] = set()
        self.known: dict[str, MediaInfo | VideoError] = {}
        self.update()

    def update(self) -> None:
        """Read the records written since the last update."""
        for folder in filter(None, (self._folder, self._transient)):
            for path in sorted(set(folder.glob("[!.]*.parquet")) - self._read):
                self._read.add(path)
                for row in _rows(path):
                    self._add(row, folder == self._transient)

    def _add(self, row: dict[str, Any], transient: bool) -> None:
        key, kind, reason, advice, limit = (row.pop(name) for name in ("key", "kind", "reason", "advice", "limit"))
        if kind is None:
            self.known[key] = MediaInfo(**row | {"cuts": tuple(row["cuts"]), "notes": tuple(row["notes"])})
        elif transient or is_still_valid(kind, limit, self._seconds):
            self.known.setdefault(key, VideoError(reason, advice, kind))

    def write(self, results: dict[str, MediaInfo | VideoError], lease: BuildLease, transient: bool = False) -> None:
        if not results:
            return
        rows: list[dict[str, Any]] = [
            {"key": key} | (dataclasses.asdict(result) if isinstance(result, MediaInfo) else
                            {"kind": result.kind, "reason": result.reason, "advice": result.advice,
                             "limit": self._seconds})
            for key, result in results.items()]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
        data = sink.getvalue()
        folder = self._transient if transient and self._transient is not None else self._folder
        path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        lease.write(path, data)
        self._read.add(path)
        self.known.update(results)
