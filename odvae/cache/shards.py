"""Rewrite shards, for commands that change an existing cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import safe_open
from safetensors.torch import save

from . import format as fmt
from .build.shard_index import ShardIndex
from .lease import BuildLease


def part_name(table: pa.Table, set_aside: Sequence[dict[str, Any]]) -> str:
    """Return the name of the shard that `write_part` writes."""
    bucket = table["bucket"][0].as_py() if len(table) else "none"
    return fmt.shard_name(bucket, table["id"].to_pylist() or [str(entry["id"]) for entry in set_aside])


def write_part(cache: Path, lease: BuildLease, source: Path, table: pa.Table, set_aside: list[dict[str, Any]],
               channels: int, replaces: Sequence[str] = ()) -> None:
    """Write a shard with some rows of another, whose tensors are in `source`; it replaces the shards `replaces`.

    Args:
        channels: of the mean latent.
    """
    tensors, moments = {}, []
    if len(table):
        with safe_open(source, framework="pt") as file:
            for clip in table["id"].to_pylist():
                tensors[clip] = file.get_tensor(clip)
                moments.append(fmt.Moments.of(tensors[clip][:channels].float().numpy()))
    data = save(tensors) if tensors else b""
    target, index = fmt.shard_paths(cache, part_name(table, set_aside))
    if data:
        lease.write(target, data)
    notes = fmt.ShardNotes(fmt.Moments.merged(moments) if moments else None, len(data), set_aside, list(replaces))
    lease.write(index, fmt.index_bytes(table, notes))


def write_header(cache: Path, header: fmt.Header, lease: BuildLease) -> ShardIndex:
    """Write the header with the current statistics of the shards, and return their index."""
    shard_index = ShardIndex(cache)
    measured = header.model_copy(update={"measured": shard_index.measured()})
    lease.write(fmt.header_path(cache), (measured.model_dump_json(indent=2) + "\n").encode())
    return shard_index
