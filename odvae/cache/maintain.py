"""Change a cache that is there: remove what no source lists any more, and put several into one."""

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

Plan = list[list[str]]  # of each cache its path, `Header.key` and `_state`


def merge(caches: Sequence[Path], out: Path) -> tuple[int, int]:
    """Put caches of one VAE, transform and storage into a new one. How many clips, how many were there twice.

    `out` is a cache from the moment it is whole, when its header is written. A merge that was stopped continues when it
    is called again, or begins anew where a source was changed meanwhile.

    Raises:
        UserError: caches that differ (naming the fields), `out` is there, no caches.
    """
    headers = [fmt.read_header(cache) for cache in caches]
    for cache, header in zip(caches, headers, strict=True):
        different = fmt.differences(header, headers[0])
        if different:
            raise UserError(f"{cache} and {caches[0]} cannot be one cache: {'; '.join(different)}")
    plan = [[os.path.abspath(cache), header.key(), _state(cache)] for cache, header in zip(caches, headers,
                                                                                           strict=True)]
    _check_out(out, plan)
    with BuildLease(out / "work") as here:
        if here.live_peers():
            raise UserError(
                f"another process is at work in {out} ({', '.join(here.live_peers())}); wait for it, or stop it"
            )
        if _old_plan(out) != plan:
            for folder in ("shards", "text"):
                if (out / folder).exists():
                    shutil.rmtree(out / folder)
        here.write(out / fmt.MERGING, json.dumps(plan, indent=2).encode())
        seen: set[str] = set()
        twice = 0
        for cache in caches:
            for name in track(list(ShardIndex(cache).shards), f"merge {cache}", "shard"):
                twice += _add_shard(cache, name, out, seen, headers[0].vae.latent_channels, here)
            copy_text(cache, out, here)
        contents = write_header(out, headers[0], here)
    shutil.rmtree(out / "work", ignore_errors=True)
    return len(contents.ids), twice


def _state(cache: Path) -> str:
    """Changes with what a merge takes from a cache."""
    files = [*cache.glob("shards/*"), *cache.glob("text/*/*")]
    stamps = sorted((str(path.relative_to(cache)), local_version_tag(path)) for path in files)
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _check_out(out: Path, plan: Plan) -> None:
    """Raises UserError unless `out` is new, empty, or where a merge of these caches was stopped."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / fmt.MERGING).is_file():
        raise UserError(f"{out} is there already; give a new folder")
    if [row[:2] for row in _old_plan(out)] != [row[:2] for row in plan]:
        raise UserError(f"{out} holds a merge of other caches that was stopped ({out / fmt.MERGING} names them); call "
                        "it again to complete it, or give a new folder")


def _old_plan(out: Path) -> Plan:
    """Of the merge that was stopped there, if any."""
    path = out / fmt.MERGING
    plan: Plan = read_json(path) if path.is_file() else []
    return plan


def _add_shard(cache: Path, name: str, out: Path, seen: set[str], channels: int, here: BuildLease) -> int:
    """Put what of a shard is not `seen` yet into `out`, unless it is there; how many clips were seen before."""
    tensors, index = fmt.shard_paths(cache, name)
    table, notes = fmt.read_index(index)
    fresh = [clip not in seen for clip in table["id"].to_pylist()]
    seen.update(table["id"].to_pylist())
    rest = table.filter(pa.array(fresh, pa.bool_()))
    whole = all(fresh) and len(table)
    if not len(rest) and not notes.set_aside:
        return len(fresh)
    copied, written = fmt.shard_paths(out, name if whole else part_name(rest, notes.set_aside))
    if written.exists():  # by this merge, before it was stopped
        return len(fresh) - len(rest)
    if whole:
        here.copy(tensors, copied)
        here.write(written, fmt.index_bytes(table, replace(notes, replaces=[])))
    else:
        write_part(out, here, tensors, rest, notes.set_aside, channels)
    return len(fresh) - len(rest)
