"""Copy some rows of a shard, with their tensors, into a new one."""

from __future__ import annotations

import pyarrow as pa
from safetensors.torch import load, save

from ...utils.storage import Storage
from .. import format as fmt
from ..moments import Moments
from ..partition import CommittedShard, Shard, tensors_of, write_shard


def part_name(table: pa.Table) -> str:
    """Return the name of the shard of some rows."""
    return fmt.shard_name(table["bucket"][0].as_py(), table["id"].to_pylist())


def copy_rows(source: Storage, number: int, shard: Shard, rows: pa.Table, target: Storage, to: int,
              channels: int, generation: int = 1) -> CommittedShard:
    """Write a shard of partition `to` with some rows of another shard.

    Args:
        channels: of the mean latent.
        generation: of the index that will hold it.
    """
    data = source.read(tensors_of(number, shard.name))
    moments = shard.moments
    if len(rows) < shard.clips:
        latents = load(data)
        tensors = {clip: latents[clip] for clip in rows["id"].to_pylist()}
        moments = Moments.merged(Moments.of(latent[:channels].float().numpy()) for latent in tensors.values())
        data = save(tensors)
    added = CommittedShard(Shard(part_name(rows), len(rows), len(data), moments), rows, ())
    write_shard(target, to, generation, added, data)
    return added
