"""Change a cache that is there: remove what no source has any more, and put several into one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from safetensors import safe_open
from safetensors.torch import save

from ..data.listing import list_entries
from ..runtime.errors import UserError
from ..runtime.progress import track
from . import format as fmt
from .contents import Contents
from .presence import Presence
from .scan import scan
from .text import copy_text
from .worker import Look
from .workers import Workers


def collect_garbage(cache: Path, sources: Sequence[str], columns: Sequence[str] = (), *,
                    dry_run: bool = False) -> tuple[int, int]:
    """Remove the clips of files that none of `sources` has any more, whatever their names. How many clips, how many
    bytes of them.

    Raises:
        UserError: no cache, a source that is not there, a build at work.
    """
    fmt.read_header(cache)
    entries = [entry for source in sources for entry in list_entries(source, columns).entries]
    with Presence(cache / "work") as here:
        _alone(cache, here)
        with Workers(1) as workers:
            found = scan((entry.place for entry in entries), cache, here, workers)
        kept = pa.array(sorted({look.content for look in found.values() if isinstance(look, Look)}), pa.string())
        contents = Contents(cache)
        contents.tidy()
        gone = freed = 0
        for name in track(list(contents.shards), "look for garbage", "shard"):
            tensors, index = fmt.shard_paths(cache, name)
            table, notes = fmt.read_index(index)
            alive = table.filter(pc.is_in(table["content"], kept))
            if len(alive) == len(table):
                continue
            gone += len(table) - len(alive)
            freed += notes.tensor_bytes * (len(table) - len(alive)) // len(table)
            if dry_run:
                continue
            if len(alive):
                _write_shard(cache, here, tensors, alive, notes.set_aside, [name])
            index.unlink()  # from here on its tensors are garbage that any build removes
            tensors.unlink()
        if not dry_run:
            contents = Contents(cache)
            header = fmt.read_header(cache).model_copy(update={"measured": contents.measured()})
            here.write(fmt.header_path(cache), (header.model_dump_json(indent=2) + "\n").encode())
    return gone, freed


def merge(caches: Sequence[Path], out: Path) -> tuple[int, int]:
    """Put caches of one VAE, transform and storage into a new one. How many clips, how many were there twice.

    Raises:
        UserError: caches that differ (naming the fields), `out` is there, no caches.
    """
    headers = [fmt.read_header(cache) for cache in caches]
    for cache, header in zip(caches, headers, strict=True):
        different = fmt.differences(header, headers[0])
        if different:
            raise UserError(f"{cache} and {caches[0]} cannot be one cache: {'; '.join(different)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already; give a new folder")
    with Presence(out / "work") as here:
        here.write(fmt.header_path(out), (headers[0].model_dump_json(indent=2) + "\n").encode())
        seen: set[str] = set()
        twice = 0
        for cache in caches:
            for name in track(list(Contents(cache).shards), f"merge {cache}", "shard"):
                tensors, index = fmt.shard_paths(cache, name)
                table, notes = fmt.read_index(index)
                fresh = [clip not in seen for clip in table["id"].to_pylist()]
                twice += len(fresh) - sum(fresh)
                seen.update(table["id"].to_pylist())
                if all(fresh) and len(table):
                    copied, written = fmt.shard_paths(out, name)
                    here.copy(tensors, copied)
                    here.write(written, fmt.index_bytes(table, notes))
                elif any(fresh) or notes.set_aside:
                    _write_shard(out, here, tensors, table.filter(pa.array(fresh, pa.bool_())), notes.set_aside)
            copy_text(cache, out, here)
        contents = Contents(out)
        header = headers[0].model_copy(update={"measured": contents.measured()})
        here.write(fmt.header_path(out), (header.model_dump_json(indent=2) + "\n").encode())
    shutil.rmtree(out / "work", ignore_errors=True)
    return len(contents.ids), twice


def _write_shard(cache: Path, here: Presence, source: Path, table: pa.Table, set_aside: list[dict[str, Any]],
                 replaces: Sequence[str] = ()) -> None:
    """A shard of some rows of another, whose tensors are in `source`, in the place of those that it replaces."""
    tensors, moments = {}, []
    channels = fmt.read_header(cache).vae.latent_channels
    if len(table):
        with safe_open(source, framework="pt") as file:
            for clip in table["id"].to_pylist():
                tensors[clip] = file.get_tensor(clip)
                moments.append(fmt.Moments.of(tensors[clip][:channels].float().numpy()))
    bucket = table["bucket"][0].as_py() if len(table) else "none"
    name = fmt.shard_name(bucket, table["id"].to_pylist() or [str(entry["id"]) for entry in set_aside])
    data = save(tensors) if tensors else b""
    target, index = fmt.shard_paths(cache, name)
    if data:
        here.write(target, data)
    notes = fmt.ShardNotes(fmt.Moments.merged(moments) if moments else None, len(data), set_aside, list(replaces))
    here.write(index, fmt.index_bytes(table, notes))


def _alone(cache: Path, here: Presence) -> None:
    if here.others():
        raise UserError(f"a build is at work in {cache} ({', '.join(here.others())}); wait for it, or stop it")
