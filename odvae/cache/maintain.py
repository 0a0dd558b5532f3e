"""Change existing caches: collect garbage, and merge several caches into one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from ..data.sources import local_version_tag
from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.progress import track
from . import format as fmt
from .build.shard_index import ShardIndex
from .garbage import Garbage, collect_garbage
from .lease import BuildLease
from .shards import part_name, write_header, write_part
from .text import copy_text

__all__ = ["Garbage", "collect_garbage", "merge"]

Plan = list[list[str]]  # path, `Header.key` and `_state` of each cache


def merge(caches: Sequence[Path], out: Path) -> tuple[int, int]:
    """Merge caches of one VAE, transform and storage into a new one; returns the numbers of clips and of duplicates.

    `out` becomes a cache when its header is written, at the end. An interrupted merge continues when it is called
    again, or starts over if a source has changed.

    Raises:
        UserError: caches that differ (naming the fields), `out` exists, no caches.
    """
    headers = [fmt.read_header(cache) for cache in caches]
    for cache, header in zip(caches, headers, strict=True):
        different = fmt.differences(header, headers[0])
        if different:
            raise UserError(f"{cache} and {caches[0]} cannot be merged: {'; '.join(different)}")
    plan = [[os.path.abspath(cache), header.key(), _state(cache)] for cache, header in zip(caches, headers,
                                                                                           strict=True)]
    _check_out(out, plan)
    with BuildLease(out / "work") as lease:
        if lease.live_peers():
            raise UserError(f"another process is running in {out} ({', '.join(lease.live_peers())}); wait for it, or "
                            "stop it")
        if _old_plan(out) != plan:
            for folder in ("shards", "text"):
                if (out / folder).exists():
                    shutil.rmtree(out / folder)
        lease.write(out / fmt.MERGE_PLAN, json.dumps(plan, indent=2).encode())
        seen: set[str] = set()
        duplicates = 0
        for cache in caches:
            for name in track(list(ShardIndex(cache).shards), f"merge {cache}", "shard"):
                duplicates += _add_shard(cache, name, out, seen, headers[0].vae.latent_channels, lease)
            copy_text(cache, out, lease)
        shard_index = write_header(out, headers[0], lease)
    shutil.rmtree(out / "work", ignore_errors=True)
    return len(shard_index.ids), duplicates


def _state(cache: Path) -> str:
    """Return a hash that changes with the files that a merge reads from a cache."""
    files = [*cache.glob("shards/*"), *cache.glob("text/*/*")]
    version_tags = sorted((str(path.relative_to(cache)), local_version_tag(path)) for path in files)
    return hashlib.sha256(json.dumps(version_tags).encode()).hexdigest()


def _check_out(out: Path, plan: Plan) -> None:
    """Raise UserError unless `out` is new, empty, or an interrupted merge of these caches."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / fmt.MERGE_PLAN).is_file():
        raise UserError(f"{out} already exists; give a new folder")
    if [row[:2] for row in _old_plan(out)] != [row[:2] for row in plan]:
        raise UserError(f"{out} holds an interrupted merge of other caches ({out / fmt.MERGE_PLAN} names them); run "
                        "that merge again to complete it, or give a new folder")


def _old_plan(out: Path) -> Plan:
    """Read the plan of an interrupted merge, if any."""
    path = out / fmt.MERGE_PLAN
    plan: Plan = read_json(path) if path.is_file() else []
    return plan


def _add_shard(cache: Path, name: str, out: Path, seen: set[str], channels: int, lease: BuildLease) -> int:
    """Copy the clips of a shard that are not in `seen` into `out`, unless they are there; returns how many clips are
    in `seen` already."""
    tensors, index = fmt.shard_paths(cache, name)
    table, notes = fmt.read_index(index)
    fresh = [clip not in seen for clip in table["id"].to_pylist()]
    seen.update(table["id"].to_pylist())
    rest = table.filter(pa.array(fresh, pa.bool_()))
    is_complete = all(fresh) and len(table)
    if not len(rest) and not notes.set_aside:
        return len(fresh)
    copied, written = fmt.shard_paths(out, name if is_complete else part_name(rest, notes.set_aside))
    if written.exists():  # by this merge, before it was interrupted
        return len(fresh) - len(rest)
    if is_complete:
        lease.copy(tensors, copied)
        lease.write(written, fmt.index_bytes(table, replace(notes, replaces=[])))
    else:
        write_part(out, lease, tensors, rest, notes.set_aside, channels)
    return len(fresh) - len(rest)
