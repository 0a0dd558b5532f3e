"""Build one partition: probe its files, plan its shards, and commit its index once all shards are encoded.

The shards are a pure function of the partition's clips and its committed index. So an interrupted build continues with
the shards that it had begun, and gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.failures import is_still_valid
from ...data.listing import Listing
from ...data.video.reader import VideoError
from ...utils.format import format_bytes
from ...utils.storage import Storage
from .. import format as fmt
from ..encoder import LatentEncoder
from ..partition import (
    REJECTS,
    CommittedShard,
    Failure,
    Partition,
    folder_of,
    parquet_bytes,
    read_partition,
    write_partition,
)
from .executors.executor import Executor
from .plan import ClipPolicy, Plan, PlannedClip, RejectedClip, assign_shards, make_plan
from .probe import probe_files
from .settings import BuildSettings
from .shard_encoder import EncodeUnit

MAX_SHARD_BYTES = 256e6


@dataclass(frozen=True)
class BuildContext:
    """What all partitions of a build share."""

    storage: Storage
    header: fmt.Header
    encoder: LatentEncoder
    settings: BuildSettings

    def bytes_of(self, clip: PlannedClip) -> int:
        """Return a clip's bytes in a shard, including its entry in the shard's header."""
        return 200 + self.encoder.bytes_of(clip.frames, clip.height, clip.width, self.settings.dtype)


class PartitionBuild:
    """The build of one partition.

    Attributes:
        plan: the clips of its files.
        units: the shards to encode.
        stored: IDs of the clips that are stored already.
    """

    def __init__(self, context: BuildContext, number: int, listing: Listing, executor: Executor) -> None:
        self.context, self.number = context, number
        self.plan = make_partition_plan(context, number, listing, executor)
        self._base = read_partition(context.storage, number)
        shards = self._assign()
        if not {one.shard.name for one in self._base.uncommitted} <= shards.keys() or any(
                self._is_tried_again(entry) for one in self._base.uncommitted for entry in one.failures):
            # Since a build was interrupted the source has changed, or clips have failed that are to be tried again: the
            # shards up to here are committed, and the others planned anew.
            self._base = write_partition(context.storage, _adopt(self._base))
            shards = self._assign()
        self._shards = shards
        self._done = {one.shard.name: one for one in self._base.uncommitted}
        self.stored = {clip for table in (self._base.table, *(one.table for one in self._base.uncommitted))
                       for clip in table["id"].to_pylist()}
        psnr_clips = self._choose_psnr_clips()
        self.units = [EncodeUnit(number, self._base.generation + 1, name, tuple(clips), psnr_clips)
                      for name, clips in shards.items() if name not in self._done]
        self._missing = {unit.name for unit in self.units}

    @property
    def complete(self) -> bool:
        return not self._missing

    def add(self, shard: CommittedShard) -> None:
        """Take a shard that has been encoded."""
        self._done[shard.shard.name] = shard
        self._missing.discard(shard.shard.name)

    def commit(self) -> list[RejectedClip]:
        """Write the index, if anything has changed, and return the files and clips that are not used."""
        base, added = self._base, tuple(self._done[name] for name in self._shards)
        tried = {clip.id for clips in self._shards.values() for clip in clips}
        failures = (*(entry for entry in base.failures if entry["id"] not in tried),
                    *(entry for one in added for entry in one.failures))
        whole = replace(base, uncommitted=added).with_uncommitted()
        table = self._update_captions(whole.table)
        if added or table is not whole.table:
            write_partition(self.context.storage, replace(whole, table=table, failures=failures))
        rejected = self.plan.set_aside + self._failed(failures)
        self._write_rejects(rejected)
        return rejected

    def _is_tried_again(self, failure: Failure) -> bool:
        settings = self.context.settings
        return settings.retry or not is_still_valid(failure["kind"], failure.get("limit"), settings.file_seconds)

    def _assign(self) -> dict[str, list[PlannedClip]]:
        """Distribute the clips that the index does not hold over shards, by name; those that failed apart, so that the
        others have the same shards whatever has failed."""
        settings, stored = self.context.settings, set(self._base.ids)
        failed = {entry["id"]: self._is_tried_again(entry) for entry in self._base.failures}
        missing = [clip for clip in self.plan.items if clip.id not in stored]
        shards = [shard for clips in ([clip for clip in missing if clip.id not in failed],
                                      [clip for clip in missing if failed.get(clip.id)])
                  for shard in assign_shards(clips, self.context.bytes_of, settings.shard_mb * 1e6,
                                             settings.shard_clips)]
        return {fmt.shard_name(shard[0].bucket, [clip.id for clip in shard]): shard for shard in shards}

    def _choose_psnr_clips(self) -> frozenset[str]:
        """Choose the clips whose PSNR is measured: at random, and the same in every build."""
        count = -(-self.context.settings.psnr_clips // self.context.header.partitions)
        return frozenset(heapq.nsmallest(count, (clip.id for clip in self.plan.items)))

    def _update_captions(self, table: pa.Table) -> pa.Table:
        """Return the rows with the paths and captions of now; the same table if they have not changed. Captions that
        cannot be read now stay as they are."""
        fresh = {clip.id: clip for clip in self.plan.items if not clip.captions_unread}
        clips = [fresh.get(clip) for clip in table["id"].to_pylist()]
        listed = np.array([clip is not None for clip in clips], bool)
        values: dict[str, list[Any]] = {
            "path": [clip and clip.ref.name for clip in clips],
            "captions": [clip and clip.captions for clip in clips],
            "caption_from_name": [clip and clip.caption_from_name for clip in clips]}
        new = {name: pa.chunked_array([pc.if_else(
            pa.array(listed), pa.array(some, table.schema.field(name).type), table[name].combine_chunks())])
            for name, some in values.items()}
        if all(column.equals(table[name]) for name, column in new.items()):
            return table
        new["caption_hashes"] = pa.chunked_array([pa.array(
            [list(map(fmt.caption_hash, some)) for some in new["captions"].to_pylist()])])
        for name, column in new.items():
            field = fmt.SCHEMA.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, column.cast(field.type))
        return table

    def _failed(self, failures: Iterable[Failure]) -> list[RejectedClip]:
        planned = {clip.id for clip in self.plan.items}
        return [RejectedClip(**{key: entry[key] for key in ("path", "start", "kind", "reason", "advice")})
                for entry in failures if entry["id"] in planned]

    def _write_rejects(self, rejected: Sequence[RejectedClip]) -> None:
        name = f"{folder_of(self.number)}/{REJECTS}"
        if rejected:
            rows = pa.Table.from_pylist([asdict(entry) for entry in rejected], schema=fmt.REJECTS)
            self.context.storage.write(name, parquet_bytes(rows))
        else:
            self.context.storage.delete(name)


def make_partition_plan(context: BuildContext, number: int, listing: Listing, executor: Executor) -> Plan:
    """Probe the files of a partition and plan their clips."""
    settings, policy = context.settings, ClipPolicy.parse(context.settings.clips)
    probed = probe_files((entry.ref for entry in listing.entries), context.storage, number, executor.probe,
                         seconds=settings.file_seconds, keep_truncated=settings.keep_truncated,
                         scenes=policy.kind == "scenes", retry=settings.retry,
                         show=context.header.partitions == 1)
    plan = make_plan(listing.entries, probed, context.header, policy)
    plan.files.update(ref.name for ref, _ in listing.set_aside)
    plan.set_aside += [RejectedClip.of(ref.name, error) for ref, error in listing.set_aside]
    plan.set_aside += [RejectedClip.of(clip.ref.name, _too_long(clip, size), clip.start) for clip in plan.items
                       if (size := context.bytes_of(clip)) > MAX_SHARD_BYTES]
    plan.items = [clip for clip in plan.items if context.bytes_of(clip) <= MAX_SHARD_BYTES]
    return plan


def _too_long(clip: PlannedClip, size: int) -> VideoError:
    return VideoError(f"{clip.ref}: the latent of its {clip.frames} frames takes {format_bytes(size)}, and a shard "
                      f"holds at most {format_bytes(MAX_SHARD_BYTES)}",
                      "cut it, with --clips every:SECONDS or back-to-back", "too long")


def _adopt(partition: Partition) -> Partition:
    """Return a partition with its uncommitted shards as committed ones."""
    adopted = partition.with_uncommitted()
    stored = set(adopted.ids)
    return replace(adopted, failures=tuple(entry for entry in adopted.failures if entry["id"] not in stored))
