"""What a build did, or would do: totals over its partitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...utils.format import format_bytes
from .. import format as fmt
from .partition_build import BuildContext
from .plan import Plan, PlannedClip, RejectedClip, note_lines, sum_set_aside

MAX_SET_ASIDE = 10_000  # rejects that a summary holds; all are in the partitions' rejects.parquet


@dataclass
class SourceTotals:
    """Totals over the partitions of a source that were planned.

    Attributes:
        set_aside: the first files and clips of the source that could not be used.
        set_aside_kinds: the number of all, by `VideoError.kind`.
        duplicates: clips of the source that are the same as another one.
        captions_from_names: files without any other caption.
        notes: number of files by conversion applied to their frames, see `VideoInfo.notes`.
    """

    files: int = 0
    clips: int = 0
    duplicates: int = 0
    captions_from_names: int = 0
    set_aside: list[RejectedClip] = field(default_factory=list)
    set_aside_kinds: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, Counter[str]] = field(default_factory=dict)  # "clips", "files", "frames", "bytes"
    _lost: float = 0.0  # files, see `share_set_aside`

    @property
    def share_set_aside(self) -> float:
        """From 0 to 1: the mean over files of the rejected share of each."""
        return self._lost / max(1, self.files)

    def add(self, plan: Plan, rejected: Iterable[RejectedClip], context: BuildContext) -> None:
        """Add a partition; `rejected` are its files and clips that are not used."""
        rejected = list(rejected)
        self.files += len(plan.files)
        self.clips += len(plan.items)
        self.duplicates += plan.duplicates
        self.captions_from_names += len({clip.ref for clip in plan.items if clip.caption_from_name})
        self.set_aside += rejected[: MAX_SET_ASIDE - len(self.set_aside)]
        self.set_aside_kinds.update(entry.kind for entry in rejected)
        self.notes.update(plan.notes)
        lost = {(entry.path, entry.start) for entry in rejected if entry.kind != "caption"}
        used = [clip.ref.name for clip in plan.items if (clip.ref.name, clip.start) not in lost]
        self._lost += sum_set_aside(plan.files, used, rejected)
        shapes: dict[tuple[int, int, int], list[PlannedClip]] = {}
        for clip in plan.items:
            shapes.setdefault((clip.frames, clip.height, clip.width), []).append(clip)
        for clips in shapes.values():
            first, count = clips[0], len(clips)
            self.buckets.setdefault(first.bucket, Counter()).update(
                clips=count, files=len({clip.content for clip in clips}), bytes=count * context.bytes_of(first),
                frames=count * first.frames if first.frames > 1 else 0)

    def lines(self, transform: fmt.TransformHeader) -> list[str]:
        """Return a table of the buckets as lines."""
        lines = [f"{'bucket':>16} {'clips':>9} {'files':>8} {'hours':>8} {'latents':>10}"]
        for bucket, total in sorted(self.buckets.items(), key=lambda pair: -pair[1]["clips"]):
            lines.append(f"{bucket:>16} {total['clips']:>9} {total['files']:>8} "
                         f"{total['frames'] / transform.frame_rate / 3600:>8.2f} {format_bytes(total['bytes']):>10}")
        lines += note_lines(self.notes)
        for kind, count in self.set_aside_kinds.most_common():
            lines.append(f"set aside, {kind}: {count}")
        if self.duplicates:
            lines.append(f"duplicate clips: {self.duplicates}")
        return lines


@dataclass
class BuildSummary(SourceTotals):
    """What a build did, and what the cache holds after it.

    Attributes:
        done: clips encoded by this build.
        reused: clips of the source that were in the cache already.
        bytes: of the cache's tensors.
        raw_bytes: of all its clips as uint8 RGB, at their encoded size.
        frames: of video, in the whole cache.
        seconds: duration of this build.
        encode_seconds: from the first shard's decoding to the last one's commit.
        frames_encoded: of video and photos, by this build.
        written: bytes of the shards of this build.
        left_out: files in the source that are not read, counted by extension.
        rates: frames per second of each encoder, by its device, while this build encoded.
        usage: see `Usage`; of all workers, but for tasks that a worker died of.
        encoders: that were in use at the end.
        decoders: decoding processes of these.
        psnr: dB, mean over the clips on which it is measured; None if there are none.
    """

    done: int = 0
    reused: int = 0
    bytes: int = 0
    raw_bytes: int = 0
    frames: int = 0
    seconds: float = 0.0
    encode_seconds: float = 0.0
    frames_encoded: int = 0
    written: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    psnr: float | None = None
    usage: dict[str, float] = field(default_factory=dict)
    encoders: int = 1
    decoders: int = 1

    def report(self, part: tuple[int, int]) -> dict[str, Any]:
        """Return what the build did, for programs: docs/compress.md explains the keys."""
        wall, rates = max(1e-9, self.encode_seconds), {name: round(rate, 3) for name, rate in self.rates.items()}
        return {
            "part": list(part), "seconds": round(self.seconds, 3),
            "files": self.files, "clips": self.clips, "encoded": self.done, "reused": self.reused,
            "duplicates": self.duplicates, "rejects": dict(self.set_aside_kinds),
            "share_set_aside": round(self.share_set_aside, 6), "left_out": self.left_out,
            "frames": self.frames_encoded, "frames_per_second": round(self.frames_encoded / wall, 3),
            "clips_per_second": round(self.done / wall, 3), "frames_per_second_by_encoder": rates,
            "bytes_written": self.written, **self._spent(Counter(self.usage), wall)}

    def _spent(self, spent: Counter[str], wall: float) -> dict[str, Any]:
        return {
            "seconds_by_stage": {stage: round(spent[f"{stage}_seconds"], 3)
                                 for stage in ("probe", "fetch", "decode", "encode")},
            "share_decoding": round(spent["decode_seconds"] / wall / max(1, self.decoders), 4),
            "share_encoding": round(spent["encode_seconds"] / wall / max(1, self.encoders), 4),
            "bytes_read": int(spent["read_bytes"]), "bytes_fetched": int(spent["fetched_bytes"]),
            "fetches": int(spent["fetches"]), "retries": int(spent["retries"])}


def report_name(part: tuple[int, int]) -> str:
    """Return the name of a build's report in the cache."""
    return "build-report.json" if part[1] == 1 else f"build-report-{part[0]}-of-{part[1]}.json"
