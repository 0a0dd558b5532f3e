"""Remove the clips that no source lists any more, and nothing else.

A clip belongs to its file's content, so a file may be renamed or moved. The content of a listed file that cannot be
used now (it is being copied, it is truncated, its disk or network is down) is unknown: every clip of its name stays.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ...data.entries import Listing
from ...data.listing import scan_source
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.errors import UserError
from ...utils.files import hash_file, path_text
from ...utils.progress import track
from ...utils.storage import Storage, open_storage
from .. import format as fmt
from ..build.decode_pool import DecodePool, probe_each
from ..build.decode_worker import MediaInfo
from ..build.probe import known_contents, probe_files
from ..build.settings import BuildSettings
from ..hashes import HashSet
from ..lock import lock_cache
from ..partition import (
    CommittedShard,
    Shard,
    iter_partitions,
    partition_numbers,
    read_partition,
    write_partition,
)
from ..statistics import update_header
from .shards import copy_rows

MAX_FILES = 10_000  # whose names are held


class Garbage(NamedTuple):
    """What was removed, or would be."""

    clips: int
    bytes: int
    files: dict[str, int]  # number of removed clips, by the path in the index; of the first `MAX_FILES`
    kept: dict[str, str]  # listed files that cannot be used now, whose clips are kept, and why
    more_files: int = 0  # beyond `files`

    def lines(self, limit: int) -> list[str]:
        """List removed and kept files, at most `limit` of each."""
        removed = [f"remove: {path} ({count} clips)" for path, count in sorted(self.files.items())]
        kept = [f"keep, because it is listed but cannot be used now: {path} ({reason})"
                for path, reason in sorted(self.kept.items())]
        return [line for lines, total in ((removed, len(removed) + self.more_files), (kept, len(kept)))
                for line in lines[:limit] + [f"... and {total - limit} more files"] * (total > limit)]


@dataclass
class _SourceContents:
    """The files that the sources list."""

    contents: HashSet  # SHA-256
    unusable: dict[MediaRef, str]  # files that cannot be used now, and why
    unknown: set[MediaRef]  # unusable files whose content is not known either


def collect_garbage(cache: Path, sources: Sequence[str], columns: Sequence[str] = (), *, dry_run: bool = False,
                    max_share: float = 1.0, force: bool = True) -> Garbage:
    """Remove the clips of files that none of `sources` lists any more, under any name.

    Args:
        columns: of lists, as for a build.
        max_share: of the cache's clips, from 0 to 1, that may be removed.
        force: continue even if a listed file can neither be read nor be matched by its name, so that some of the
            removed clips may be its own.

    Raises:
        UserError: no cache, a missing source, a running build, or more to remove than allowed; nothing is removed.
    """
    storage = open_storage(cache)
    header = fmt.read_header(storage)
    with lock_cache(storage):
        listed = _list(storage, header, sources, columns)
        by_last, matches = _names_by_last(listed.unusable), dict[str, list[MediaRef]]()
        for partition in iter_partitions(storage, ("path",)) if by_last else ():
            matches |= _match_by_name(pc.unique(partition.table["path"]).to_pylist(), by_last)
        unmatched = listed.unknown.difference(*matches.values())
        is_garbage = partial(_is_garbage, listed.contents, pa.array(sorted(matches), pa.string()))
        clips, removed, freed, files, more = 0, 0, 0, dict[str, int](), 0
        for partition in track(iter_partitions(storage), "find garbage", "partition", header.partitions):
            clips += len(partition.table)
            found = Counter[str]()
            for shard, table in partition.tables():
                garbage_rows = table.filter(is_garbage(table))
                removed += len(garbage_rows)
                freed += shard.bytes * len(garbage_rows) // max(1, shard.clips)
                found.update(garbage_rows["path"].to_pylist())
            room = MAX_FILES - len(files)
            files |= islice(found.items(), room)
            more += max(0, len(found) - room)
        kept = {path: listed.unusable[refs[0]] for path, refs in matches.items()}
        garbage = Garbage(removed, freed, files, kept, more)
        if removed and not dry_run:
            _check(garbage, clips, max_share, [] if force else sorted(map(str, unmatched)))
            for number in partition_numbers(storage):
                _remove(storage, number, header.vae.latent_channels, is_garbage)
            update_header(storage, header)
    return garbage


def _is_garbage(contents: HashSet, paths: pa.Array, table: pa.Table) -> pa.ChunkedArray:
    """Return which rows are of none of these contents and paths."""
    is_listed = pa.array(contents.contains(table["content"].to_pylist()))
    return pc.invert(pc.or_(is_listed, pc.is_in(table["path"], paths)))


def _remove(storage: Storage, number: int, channels: int,
            is_garbage: Callable[[pa.Table], pa.ChunkedArray]) -> None:
    """Remove the garbage of a partition: shards that keep some clips are written again, then the index, then the old
    shards are deleted."""
    partition = read_partition(storage, number).with_uncommitted()
    kept, added = list[tuple[Shard, pa.Table]](), list[CommittedShard]()
    for shard, table in partition.tables():
        rest = table.filter(pc.invert(is_garbage(table)))
        if len(rest) == len(table):
            kept.append((shard, table))
        elif len(rest):
            added.append(copy_rows(storage, number, shard, rest, storage, number, channels, partition.generation + 1))
    if len(kept) < len(partition.shards):
        tables = [table for _, table in kept] or [fmt.SCHEMA.empty_table()]
        write_partition(storage, replace(partition, shards=tuple(shard for shard, _ in kept),
                                         table=pa.concat_tables(tables), uncommitted=tuple(added)).with_uncommitted())


def _list(storage: Storage, header: fmt.Header, sources: Sequence[str], columns: Sequence[str]) -> _SourceContents:
    """List every file of the sources, even if its caption or its tar cannot be read."""
    listed = _SourceContents(HashSet(), {}, set())
    # With truncated files: a build may have kept their readable part.
    settings = BuildSettings(keep_truncated=True)
    with DecodePool(min(8, os.cpu_count() or 1), settings.file_seconds) as workers:
        probe = partial(probe_each, workers, settings)
        for source in sources:
            with scan_source(source, columns) as scanned:
                for number in track(range(header.partitions), "list", "partition"):
                    _list_partition(listed, storage, number, scanned.partition(number, header.partitions), probe)
    return listed


def _list_partition(listed: _SourceContents, storage: Storage, number: int, listing: Listing,
                    probe: Callable[[Sequence[MediaRef]], Iterator[MediaInfo | VideoError]]) -> None:
    """Add what a source lists of a partition."""
    refs = dict.fromkeys(entry.ref for entry in listing.entries)
    closed = {ref: error.reason for ref, error in listing.set_aside if ref not in refs}
    listed.unusable |= closed  # folders and tars that cannot be listed now
    listed.unknown |= closed.keys()
    known = known_contents(refs, storage, number)
    listed.contents.update(known.values())
    results = probe_files([ref for ref in refs if ref not in known], storage, number, probe,
                          seconds=BuildSettings().file_seconds, keep_truncated=True)
    for ref, info in results.items():
        _add(listed, ref, info)


def _add(listed: _SourceContents, ref: MediaRef, info: MediaInfo | VideoError) -> None:
    if isinstance(info, MediaInfo):
        listed.contents.update([info.content])
        if info.readable is not None:
            listed.unusable[ref] = "it is truncated"
        return
    listed.unusable[ref] = info.reason
    content = None if info.kind in ("hang", "remote") else _hash_or_none(ref)
    if content is None:
        listed.unknown.add(ref)
    else:
        listed.contents.update([content])


def _hash_or_none(ref: MediaRef) -> str | None:
    try:
        with ref.open_local() as path:
            return hash_file(path)
    except (VideoError, OSError):
        return None


def _names_by_last(refs: Iterable[MediaRef]) -> dict[str, list[tuple[str, MediaRef]]]:
    """Return the names of files, relative and absolute, by their last part."""
    by_last: dict[str, list[tuple[str, MediaRef]]] = {}
    for ref in refs:
        whole = str(ref) if is_url(ref.path) else os.path.abspath(path_text(ref.path)) + str(ref).removeprefix(
            path_text(ref.path))
        for name in {_strip_root(ref.name), _strip_root(whole)}:
            by_last.setdefault(name.rpartition("/")[2], []).append((name, ref))
    return by_last


def _match_by_name(paths: Iterable[str],
                   by_last: Mapping[str, Sequence[tuple[str, MediaRef]]]) -> dict[str, list[MediaRef]]:
    """Match paths of an index with files (`_names_by_last`), whatever folder either is relative to: one must be the end
    of the other. The name of a folder or of a tar matches everything in it."""
    matches: dict[str, list[MediaRef]] = {}
    candidates = [(path, parent) for path in paths for parent in _with_parents(_strip_root(path))]
    for path, parent in candidates:
        for name, ref in by_last.get(parent.rpartition("/")[2], []):
            if f"/{name}".endswith(f"/{parent}") or f"/{parent}".endswith(f"/{name}"):
                matches.setdefault(path, []).append(ref)
    return matches


def _with_parents(path: str) -> list[str]:
    """Return a path, the tar that it is in, and the folders above."""
    tar = path.partition("::")[0]
    return list(dict.fromkeys([path, tar, *(str(parent) for parent in PurePosixPath(tar).parents)]))


def _strip_root(name: str) -> str:
    """Remove leading "/", "./" and "../"."""
    while name.startswith(("../", "./", "/")):
        name = name.partition("/")[2]
    return name


def _check(garbage: Garbage, clips: int, max_share: float, unmatched: Sequence[str]) -> None:
    """Raise UserError if more would be removed than allowed."""
    listing = "\n".join(["", *garbage.lines(20)])
    if unmatched:
        raise UserError(f"{len(unmatched)} listed files cannot be read now and match no clip by name (such as "
                        f"{unmatched[0]}): some of the clips to remove may be theirs. Make them readable, or add "
                        f"--yes; nothing was removed{listing}")
    if garbage.clips > max_share * clips:
        raise UserError(f"{garbage.clips} of {clips} clips would be removed, more than {max_share:.0%}: check that all "
                        f"sources are given and complete, then add --yes; nothing was removed{listing}")
