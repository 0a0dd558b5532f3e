"""What is known of the source's files: each is read once, by the process that comes first, and again if it changed."""

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

from ...data.failures import as_failure, is_recorded, still_counts
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.progress import bar
from ..lease import BuildLease
from .decode_pool import Workers
from .decode_worker import MediaInfo

FILES_A_UNIT = 128  # that one process takes at a time
WAIT = 0.3  # s between two looks at what other processes have done

SCHEMA = pa.schema([
    ("key", pa.string()),  # see `_key`
    ("content", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("frames", pa.int32()),
    ("duration", pa.float64()), ("readable", pa.int32()), ("cuts", pa.list_(pa.float64())),
    ("notes", pa.list_(pa.string())),
    ("kind", pa.string()), ("reason", pa.string()), ("advice", pa.string()),  # where it cannot be used
    ("limit", pa.float64()),  # s that it was given, where that was too little
])
Found = dict[MediaRef, MediaInfo | VideoError]


def scan(places: Iterable[MediaRef], cache: Path, here: BuildLease, workers: Workers, *, keep_truncated: bool = False,
         scenes: bool = False, retry: bool = False) -> Found:
    """Look at all places, together with the other processes that are at work in the cache.

    A failure that is transient (`failures.KINDS`) is no knowledge of the file: the processes that are at work share it,
    so that all make one plan, and the next build looks again.

    Args:
        keep_truncated, scenes: as `decode_worker.probe_file` takes them.
        retry: look again at the files that could not be used.
    """
    places = list(dict.fromkeys(places))
    keys = {place: _key(place, keep_truncated, scenes) for place in places}
    records = _Records(cache / "files", here.shared, workers.seconds)
    known = records.known
    if retry:
        for key in [key for key, found in known.items() if not isinstance(found, MediaInfo)]:
            del known[key]
    # Units by the hash of a name, so that all processes cut alike whenever they come.
    count = -(-len(places) // FILES_A_UNIT)
    units: dict[str, list[MediaRef]] = {}
    for place in places:
        if keys[place] not in known:
            number = int(hashlib.sha256(place.name.encode()).hexdigest()[:8], 16) % count
            units.setdefault(f"files-{number}", []).append(place)

    def one(place: MediaRef) -> MediaInfo | VideoError:
        try:
            return workers.look(place, keep_truncated=keep_truncated, scenes=scenes)
        except VideoError as error:
            return error

    def do(unit: str) -> None:
        records.update()
        rest = [place for place in units[unit] if keys[place] not in known]
        fresh: dict[str, MediaInfo | VideoError] = {}
        lasting = set[str]()
        for place, found in zip(rest, pool.map(one, rest), strict=True):
            fresh[keys[place]] = found
            if place.version_tag and (isinstance(found, MediaInfo) or is_recorded(found.kind)):
                lasting.add(keys[place])
            progress.update(1)
        progress.update(len(units[unit]) - len(rest))
        records.write({key: found for key, found in fresh.items() if key in lasting}, here)
        records.write({key: found for key, found in fresh.items() if key not in lasting}, here, passing=True)

    def done() -> set[str]:
        records.update()
        return {unit for unit, some in units.items() if all(keys[place] in known for place in some)}

    if units:
        with (bar(sum(map(len, units.values())), "look at the files", "file") as progress,
              ThreadPoolExecutor(workers.count) as pool):
            try:
                run_shared(list(units), here, do, done)
            except BaseException:
                workers.cancel_retries()
                raise
    return {place: known[keys[place]] for place in places}


def known_contents(places: Iterable[MediaRef], cache: Path) -> dict[MediaRef, str]:
    """SHA-256 of those files that were read before, in whichever way, and have not changed since."""
    known = _Records(cache / "files").known
    found = {}
    for place in places:
        looks = (
            [known.get(_key(place, *flags)) for flags in product((False, True), repeat=2)] if place.version_tag else []
        )
        content = next((look.content for look in looks if isinstance(look, MediaInfo)), None)
        if content is not None:
            found[place] = content
    return found


def run_shared(
    units: Sequence[str], here: BuildLease, do: Callable[[str], object], done: Callable[[], set[str]]
) -> None:
    """Do all units of work that no other process does, then wait for the others', and take over from those that die.

    Args:
        do: one unit, which is claimed meanwhile.
        done: which units are done, whoever did them; asked only where one is another's.
    """
    waiting = list(units)
    while waiting:
        waiting = [unit for unit in waiting if not _do_claimed(unit, here, do)]
        if waiting:
            finished = done()
            waiting = [unit for unit in waiting if unit not in finished]
            time.sleep(WAIT if waiting else 0)


def _do_claimed(unit: str, here: BuildLease, do: Callable[[str], object]) -> bool:
    """Do a unit of work, unless another process does; returns whether it was done here."""
    if not here.claim(unit):
        return False
    try:
        do(unit)
    finally:
        here.release(unit)
    return True


def _key(place: MediaRef, keep_truncated: bool, scenes: bool) -> str:
    path = place.path if is_url(place.path) else os.path.abspath(place.path)
    identity = [path, place.offset, place.column, place.version_tag, json.dumps([keep_truncated, scenes])]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of records. One that is damaged is as good as none: its places are looked at again."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).cast(SCHEMA).to_pylist()
    except FileNotFoundError:  # the last process of an earlier build took it along
        return []
    except (pa.ArrowException, ValueError, OSError) as error:
        if is_recorded(as_failure(error, str(path)).kind):
            path.unlink(missing_ok=True)
        return []
    return rows


class _Records:
    """The files in which a cache keeps what is known of its sources.

    Args:
        folder: of what stands until a file changes.
        passing: of what holds while processes are at work; None: nothing.
        seconds: that a file may take. A failure under a lower limit counts no more.

    Attributes:
        known: by `_key`. Where two processes found different things, what can be used counts.
    """

    def __init__(self, folder: Path, passing: Path | None = None, seconds: float = 0.0) -> None:
        self._folder, self._passing, self._seconds = folder, passing, seconds
        self._read: set[Path] = set()
        self.known: dict[str, MediaInfo | VideoError] = {}
        self.update()

    def update(self) -> None:
        """Read what was written since."""
        for folder in filter(None, (self._folder, self._passing)):
            for path in sorted(set(folder.glob("[!.]*.parquet")) - self._read):
                self._read.add(path)
                for row in _rows(path):
                    self._add(row, folder == self._passing)

    def _add(self, row: dict[str, Any], passing: bool) -> None:
        key, kind, reason, advice, limit = (row.pop(name) for name in ("key", "kind", "reason", "advice", "limit"))
        if kind is None:
            self.known[key] = MediaInfo(**row | {"cuts": tuple(row["cuts"]), "notes": tuple(row["notes"])})
        elif passing or still_counts(kind, limit, self._seconds):
            self.known.setdefault(key, VideoError(reason, advice, kind))

    def write(self, found: dict[str, MediaInfo | VideoError], here: BuildLease, passing: bool = False) -> None:
        if not found:
            return
        rows: list[dict[str, Any]] = [
            {"key": key} | (dataclasses.asdict(one) if isinstance(one, MediaInfo) else
                            {"kind": one.kind, "reason": one.reason, "advice": one.advice, "limit": self._seconds})
            for key, one in found.items()]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
        data = sink.getvalue()
        folder = self._passing if passing and self._passing is not None else self._folder
        path = folder / f"{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        here.write(path, data)
        self._read.add(path)
        self.known.update(found)
