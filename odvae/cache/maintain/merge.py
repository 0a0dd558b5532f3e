"""Merge several caches into a new one, or copy one into another number of partitions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ...utils.errors import UserError
from ...utils.progress import track
from ...utils.storage import LocalStorage, Storage, open_storage
from .. import format as fmt
from ..lock import lock_cache
from ..partition import (
    Partition,
    folder_of,
    partition_numbers,
    partition_of,
    read_partition,
    write_partition,
)
from ..statistics import measure
from ..text import list_shards, text_folders
from .shards import copy_rows, part_name
from .text import copy_text

Plan = list[list[str]]  # path, `Header.key` and `_state` of each cache


class _Source(NamedTuple):
    """A cache that is merged."""

    storage: Storage
    header: fmt.Header
    numbers: list[int]  # of its partitions


def merge(caches: Sequence[Path | str], out: Path | str, partitions: int | None = None) -> tuple[int, int]:
    """Merge caches of one VAE, transform and storage into a new one; returns the numbers of clips and of duplicates.

    `out` becomes a cache when its header is written, at the end. An interrupted merge continues when it is called
    again, or starts over if a source has changed.

    Args:
        partitions: of `out`, a power of two; None: as many as the largest cache has.

    Raises:
        UserError: caches that differ (naming the fields), `out` exists, no caches.
    """
    storages = [open_storage(cache) for cache in caches]
    headers = [fmt.read_header(storage) for storage in storages]
    for cache, header in zip(caches, headers, strict=True):
        different = fmt.differences(header, headers[0])
        if different:
            raise UserError(f"{cache} and {caches[0]} cannot be merged: {'; '.join(different)}")
    count = partitions or max(header.partitions for header in headers)
    if count & (count - 1):
        raise UserError(f"--partitions {count} must be a power of two")
    plan = [["partitions", str(count), ""], *([_path(storage), header.key(), _state(storage)] for header, storage in
                                              zip(headers, storages, strict=True))]
    target = open_storage(out)
    _check_out(target, plan)
    with lock_cache(target):
        if _old_plan(target) != plan:
            for folder in ("partitions", "text"):
                target.delete(folder)
        target.write(fmt.MERGE_PLAN, json.dumps(plan, indent=2).encode())
        clips = duplicates = 0
        sources = [_Source(storage, header, partition_numbers(storage))
                   for storage, header in zip(storages, headers, strict=True)]
        for number in track(range(count), "merge", "partition"):
            more = _merge_partition(sources, target, number, count)
            clips, duplicates = clips + more[0], duplicates + more[1]
        copy_text(storages, target)
        measured = measure(target).measured
        fmt.write_header(target, headers[0].model_copy(update={"partitions": count, "measured": measured}))
        target.delete(fmt.MERGE_PLAN)
    return clips, duplicates


def _path(storage: Storage) -> str:
    """Return where a cache is, from any folder."""
    return os.path.abspath(storage.root) if isinstance(storage, LocalStorage) else storage.root


def _state(storage: Storage) -> str:
    """Return a hash that changes with what a merge reads from a cache."""
    folders = [folder_of(number) for number in partition_numbers(storage)]
    names = sorted((f"{folder}/{name}", size) for folder in folders for name, size in storage.sizes(folder).items())
    names += [(text.path(name), size) for text in text_folders(storage) for name, size in list_shards(text).items()]
    generations = [read_partition(storage, number, (), check=False).generation for number in partition_numbers(storage)]
    return hashlib.sha256(json.dumps([names, generations]).encode()).hexdigest()


def _check_out(target: Storage, plan: Plan) -> None:
    """Raise UserError unless `out` is new, empty, or an interrupted merge of these caches."""
    if not target.exists(fmt.MERGE_PLAN):
        if target.sizes("") or target.folders("") not in ([], [fmt.WORK]):
            raise UserError(f"{target.root} already exists; give a new folder")
        return
    if [row[:2] for row in _old_plan(target)] != [row[:2] for row in plan]:
        raise UserError(f"{target.root} holds an interrupted merge of other caches ({target.path(fmt.MERGE_PLAN)} "
                        "names them); run that merge again to complete it, or give a new folder")


def _old_plan(target: Storage) -> Plan:
    """Read the plan of an interrupted merge, if any."""
    plan: Plan = json.loads(target.read(fmt.MERGE_PLAN)) if target.exists(fmt.MERGE_PLAN) else []
    return plan


def _merge_partition(sources: Sequence[_Source], target: Storage, number: int, count: int) -> tuple[int, int]:
    """Copy the clips of one partition, unless they are there; returns the numbers of clips and of duplicates."""
    merged, seen, duplicates = Partition(number), set[str](), 0
    old = read_partition(target, number)
    copied = {one.shard.name: one for one in old.uncommitted}
    for storage, header, partition in _read_sources(sources, number, count):
        for shard, table in partition.tables():
            mine = table.filter(pa.array([partition_of(path, count) == number for path in table["path"].to_pylist()],
                                         pa.bool_()))
            rest = mine.filter(pa.array([clip not in seen for clip in mine["id"].to_pylist()], pa.bool_()))
            duplicates += len(mine) - len(rest)
            seen.update(rest["id"].to_pylist())
            if len(rest) and not old.generation:
                added = copied.get(part_name(rest)) or copy_rows(
                    storage, partition.number, shard, rest, target, number, header.vae.latent_channels)
                merged = replace(merged, uncommitted=(*merged.uncommitted, added))
        merged = replace(merged, failures=(*merged.failures, *(
            entry for entry in partition.failures if partition_of(entry["path"], count) == number)))
    if not old.generation and (merged.uncommitted or merged.failures):
        write_partition(target, merged.with_uncommitted())
    return len(seen), duplicates


def _read_sources(sources: Sequence[_Source], number: int,
                  count: int) -> Iterator[tuple[Storage, fmt.Header, Partition]]:
    """Yield the partitions that hold clips of partition `number` of `count`: of a cache of more partitions several, of
    a cache of fewer one."""
    for source in sources:
        common = min(count, source.header.partitions)
        for other in source.numbers:
            if other % common == number % common:
                yield source.storage, source.header, read_partition(source.storage, other).with_uncommitted()
