"""An index of a cache's committed shards, for builds and for commands that change a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ...data.failures import is_recorded
from .. import format as fmt
from ..lease import BuildLease
from .plan import PlannedClip, RejectedClip


@dataclass
class Shard:
    ids: list[str]
    notes: fmt.ShardNotes
    frames: int
    raw_bytes: int
    bytes: int  # of both files
    psnr: list[float]


class ShardIndex:
    """The committed shards; `update` reads those that were added since.

    Attributes:
        ids: of all clips.
        failed: by ID, the records of clips that could not be encoded.

    Raises:
        UserError: a shard's index is damaged, or its tensors are missing or truncated.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.shards: dict[str, Shard] = {}
        self.ids: set[str] = set()
        self.failed: dict[str, dict[str, Any]] = {}
        self.replaced: set[str] = set()  # shards that others replace
        self.update()

    def update(self) -> None:
        new = [name for name in fmt.committed_shards(self.cache)
               if name not in self.shards and name not in self.replaced]
        for name in new:
            self._add(name)
        for name in self.replaced & self.shards.keys():
            del self.shards[name]
        for name in new:
            if name in self.shards:
                fmt.check_tensors(self.cache, name, self.shards[name].notes)
        self.ids = {clip for shard in self.shards.values() for clip in shard.ids}

    def committed(self, name: str) -> bool:
        return name in self.shards or fmt.shard_paths(self.cache, name)[1].exists()

    def update_captions(self, items: Sequence[PlannedClip], lease: BuildLease) -> None:
        """Update the paths and captions of clips in the cache; captions that could not be read now stay as they
        are."""
        columns = ("path", "captions", "caption_hashes", "caption_from_name")
        fresh = {item.id: (item.ref.name, list(item.captions), list(map(fmt.caption_hash, item.captions)),
                           item.caption_from_name) for item in items if not item.captions_unread}
        for name, shard in self.shards.items():
            if fresh.keys().isdisjoint(shard.ids):
                continue
            index = fmt.shard_paths(self.cache, name)[1]
            table = fmt.read_index(index, columns)[0]
            rows = list(zip(*(table[column].to_pylist() for column in columns), strict=True))
            new = [fresh.get(clip, row) for clip, row in zip(shard.ids, rows, strict=True)]
            if new != rows:
                table, notes = fmt.read_index(index)
                for column, values in zip(columns, zip(*new, strict=True), strict=True):
                    table = table.set_column(fmt.SCHEMA.get_field_index(column), fmt.SCHEMA.field(column),
                                             pa.array(values, fmt.SCHEMA.field(column).type))
                lease.write(index, fmt.index_bytes(table, notes))

    def remove_orphans(self) -> None:
        """Remove leftovers of interrupted commands: replaced shards, and tensors without an index. Only while no other
        process is running."""
        for name in self.replaced:
            fmt.shard_paths(self.cache, name)[1].unlink(missing_ok=True)
        files = list((self.cache / "shards").iterdir())
        committed = {path.stem for path in files if path.suffix == ".parquet"}
        for path in files:
            if path.suffix != ".parquet" and path.stem not in committed:
                path.unlink()

    def forget_failures(self, ids: Iterable[str], lease: BuildLease) -> None:
        """Remove the failures of these clips, so that they are tried again."""
        ids = set(ids) & self.failed.keys()
        for name in [name for name, shard in self.shards.items()
                     if any(entry["id"] in ids for entry in shard.notes.set_aside)]:
            index = fmt.shard_paths(self.cache, name)[1]
            table, notes = fmt.read_index(index)
            left = [entry for entry in notes.set_aside if entry["id"] not in ids]
            if len(table) or left:
                lease.write(index, fmt.index_bytes(table, replace(notes, set_aside=left)))
            else:
                index.unlink()
                del self.shards[name]
                continue
            self._add(name)
        self.failed = {clip: entry for clip, entry in self.failed.items() if clip not in ids}

    def failures(self, ids: Iterable[str]) -> list[RejectedClip]:
        """Return which of these clips could not be encoded, and why."""
        rejected, missing = dict[str, dict[str, Any]](), set(ids) - self.ids
        for _, shard in sorted(self.shards.items()):
            for entry in shard.notes.set_aside:
                if entry["id"] in missing and (entry["id"] not in rejected or is_recorded(entry["kind"])):
                    rejected[entry["id"]] = entry
        return [RejectedClip(**{key: entry[key] for key in ("path", "start", "kind", "reason", "advice")})
                for entry in rejected.values()]

    def measured(self) -> fmt.Measured | None:
        """Merge the shards' statistics; None if there are no clips."""
        shards = [self.shards[name] for name in sorted(self.shards)]  # so that rounding is the same in every build
        parts = [shard.notes.moments for shard in shards if shard.notes.moments is not None]
        if not parts:
            return None
        moments = fmt.Moments.merged(parts)
        psnr = [value for shard in shards for value in shard.psnr]
        return fmt.Measured(clips=len(self.ids), latents_mean=moments.mean.tolist(), latents_std=moments.std.tolist(),
                            psnr=sum(psnr) / len(psnr) if psnr else None, psnr_clips=len(psnr))

    def total(self, name: Literal["bytes", "raw_bytes", "frames"]) -> int:
        return sum(getattr(shard, name) for shard in self.shards.values())

    def _add(self, name: str) -> None:
        tensors, index = fmt.shard_paths(self.cache, name)
        table, notes = fmt.read_index(index, ("id", "frames", "height", "width", "psnr"))
        columns: dict[str, list[Any]] = table.to_pydict()
        size = index.stat().st_size + (tensors.stat().st_size if tensors.exists() else 0)
        raw = sum(3 * t * h * w for t, h, w in zip(columns["frames"], columns["height"], columns["width"], strict=True))
        self.shards[name] = Shard(columns["id"], notes, sum(columns["frames"]), raw, size,
                                  [value for value in columns["psnr"] if value is not None])
        self.replaced.update(notes.replaces)
        for entry in notes.set_aside:  # a recorded failure wins over a transient one
            if entry["id"] not in self.failed or is_recorded(entry["kind"]):
                self.failed[entry["id"]] = entry
