"""From files to clips: which spans are cut, which bucket each falls into, and which shard it will lie in."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ...data.sources import MediaRef, SourceSpan
from ...data.video.reader import TOLERANCE, VideoError, count_frames
from ...utils.errors import UserError
from ...utils.files import path_text
from ...utils.format import format_bytes
from .. import format as fmt
from .decode_worker import MediaInfo
from .probe import Found

CUTS = "back-to-back, every:SECONDS, uniform:CLIPS, whole or scenes"


@dataclass(frozen=True)
class ClipPolicy:
    """Which spans of a video become clips.

    "back-to-back": one after the other; "every:S": one begins every S seconds; "uniform:N": N, evenly spread; "whole":
    the whole file as one; "scenes": back to back inside each scene, none across a cut.
    """

    kind: str = "back-to-back"
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> ClipPolicy:
        """Raises UserError."""
        found = re.fullmatch(r"(back-to-back|whole|scenes)|(every|uniform):(\d+(?:\.\d+)?)", text)
        if not found or (found[2] and (not float(found[3]) > 0 or (found[2] == "uniform" and float(found[3]) % 1))):
            raise UserError(f"--clips {text} is not known; give {CUTS}")
        return cls(found[1]) if found[1] else cls(found[2], float(found[3]))

    def spans(self, begin: float, end: float, lengths: Sequence[int], rate: float, ratio: int,
              cuts: Sequence[float] = ()) -> list[tuple[float, int]]:
        """(start in s, frames) of the clips between `begin` and `end` s of a file.

        Args:
            lengths: in frames, of which each clip takes the longest that fits; none for "whole": any 1 + ratio * k.
            rate: frames a second.
            cuts: s, where scenes begin.
        """
        if self.kind == "whole":
            most = count_frames(end - begin, rate)
            fit = [n for n in lengths if n <= most]
            length = max(fit) if lengths and fit else 0 if lengths else 1 + (most - 1) // ratio * ratio
            return [(begin, length)] if length > 1 else []
        if self.kind == "scenes":
            borders = [begin, *(cut for cut in sorted(cuts) if begin < cut < end), end]
            # A clip's last frame is to lie before the next scene's first.
            return [span for a, b in pairwise(borders) for span in _row(a, b, lengths, rate)]
        if self.kind == "every":
            count = max(0, math.ceil((end - begin - TOLERANCE) / self.value))
            found = [(begin + k * self.value, _longest(end - begin - k * self.value, lengths, rate))
                     for k in range(count)]
            return [(start, length) for start, length in found if length]
        if self.kind == "uniform":
            length = _longest(end - begin, lengths, rate)
            spare = end - begin - TOLERANCE - (length - 1) / rate - 1e-9
            n = int(self.value)
            return [(begin + (spare * k / (n - 1) if n > 1 else spare / 2), length) for k in range(n)] if length else []
        return list(_row(begin, end, lengths, rate))


def _row(begin: float, end: float, lengths: Sequence[int], rate: float) -> Iterator[tuple[float, int]]:
    """Back to back."""
    frame = 0  # counted, so that starts do not drift
    while length := _longest(end - begin - frame / rate, lengths, rate):
        yield begin + frame / rate, length
        frame += length


def _longest(seconds: float, lengths: Sequence[int], rate: float) -> int:
    """0 where none fits."""
    there = count_frames(seconds, rate)
    return max((n for n in lengths if n <= there), default=0)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` whose shape is nearest; of those of one shape the largest that need not enlarge the picture,
    else the smallest."""
    def shape(size: tuple[int, int]) -> float:
        return round(abs(math.log(size[0] * width / size[1] / height)), 3)

    best = min(map(shape, sizes))
    alike = sorted((size for size in sizes if shape(size) == best), key=lambda size: size[0] * size[1])
    return next((size for size in reversed(alike) if size[0] <= height and size[1] <= width), alike[0])


@dataclass(frozen=True)
class PlannedClip:
    """A clip that belongs into the cache."""

    id: str
    place: MediaRef
    content: str  # SHA-256 of the file
    readable: int | None  # frames, of a file that is cut off
    start: float  # s
    frames: int  # 1 for a photo
    height: int
    width: int
    captions: tuple[str, ...]
    caption_from_name: bool
    captions_unread: bool = False  # those of an earlier build stay

    @property
    def bucket(self) -> str:
        return fmt.bucket_name(self.frames, self.height, self.width)


@dataclass(frozen=True)
class RejectedClip:
    """A file, or a clip of it, that is not used."""

    path: str
    start: float
    kind: str  # see `VideoError.kind`
    reason: str
    advice: str

    @classmethod
    def of(cls, path: str, error: VideoError, start: float = 0.0) -> RejectedClip:
        return cls(path_text(path), start, error.kind, error.reason, error.advice)

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


@dataclass
class Plan:
    """What a source gives."""

    items: list[PlannedClip] = field(default_factory=list)  # of clips that are the same the first one
    duplicates: int = 0
    set_aside: list[RejectedClip] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # names of all that the source lists
    notes: Counter[str] = field(default_factory=Counter)  # files by what is done to their pictures, `VideoInfo.notes`

    @property
    def share_set_aside(self) -> float:
        """As far as is known before anything is encoded."""
        return share_set_aside(self.files, (item.place.name for item in self.items), self.set_aside)

    def report(self, transform: fmt.TransformHeader, bytes_of: Any) -> list[str]:
        """What falls where, as lines of a table. `bytes_of` an item: of its latent."""
        by_bucket: dict[str, list[PlannedClip]] = {}
        for item in self.items:
            by_bucket.setdefault(item.bucket, []).append(item)
        lines = [f"{'bucket':>16} {'clips':>9} {'files':>8} {'hours':>8} {'latents':>10}"]
        for bucket, items in sorted(by_bucket.items(), key=lambda pair: -len(pair[1])):
            hours = sum(item.frames for item in items if item.frames > 1) / transform.frame_rate / 3600
            lines.append(f"{bucket:>16} {len(items):>9} {len({item.content for item in items}):>8} {hours:>8.2f} "
                         f"{format_bytes(sum(map(bytes_of, items))):>10}")
        lines += note_lines(self.notes)
        for kind, count in Counter(entry.kind for entry in self.set_aside).most_common():
            lines.append(f"set aside, {kind}: {count}")
        if self.duplicates:
            lines.append(f"the same clip once more: {self.duplicates}")
        return lines


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """What is done to pictures, for a summary: "deinterlaced: 3 files"."""
    return [f"{note}: {count} file{'s' * (count > 1)}" for note, count in sorted(notes.items())]


def make_plan(entries: Iterable[SourceSpan], found: Found, header: fmt.Header, cutting: ClipPolicy) -> Plan:
    """The clips of all entries in order, each with its bucket and its id."""
    transform, key = header.transform, header.key()
    plan, seen = Plan(), set[str]()
    failed: set[MediaRef] = set()
    for entry in entries:
        first, look = entry.place.name not in plan.files, found[entry.place]
        plan.files.add(entry.place.name)
        if first and isinstance(look, MediaInfo):
            plan.notes.update(look.notes)
        if isinstance(look, VideoError):
            if entry.place not in failed:
                plan.set_aside.append(RejectedClip.of(entry.place.name, look))
            failed.add(entry.place)
            continue
        spans = _spans(entry, look, header, cutting)
        if not spans:
            plan.set_aside.append(RejectedClip.of(entry.place.name, _too_short(entry, look, transform, cutting),
                                              entry.start))
        height, width = nearest_size(look.height, look.width, transform.sizes)
        for start, frames in spans:
            name = fmt.clip_id(look.content, start, frames, transform.frame_rate, (height, width), key)
            if name in seen:
                plan.duplicates += 1
                continue
            seen.add(name)
            plan.items.append(PlannedClip(name, entry.place, look.content, look.readable, start, frames, height, width,
                                   entry.captions, entry.caption_from_name, entry.captions_unread))
    return plan


def _spans(entry: SourceSpan, look: MediaInfo, header: fmt.Header, cutting: ClipPolicy) -> list[tuple[float, int]]:
    if look.is_photo:
        return [(0.0, 1)]
    return cutting.spans(entry.start, min(entry.end, look.duration), header.transform.frames,
                         header.transform.frame_rate, header.vae.temporal_compression_ratio, look.cuts)


def _too_short(entry: SourceSpan, look: MediaInfo, transform: fmt.TransformHeader, cutting: ClipPolicy) -> VideoError:
    seconds = max(0.0, min(entry.end, look.duration) - entry.start)
    whose = "its" if entry.end == math.inf and not entry.start else f"from {entry.start:g} s on its"
    least = min(transform.frames, default=2)
    within = " between its cuts" if cutting.kind == "scenes" else ""
    return VideoError(f"{entry.place} is too short{within}: {whose} {seconds:.2f} s give "
                      f"{count_frames(seconds, transform.frame_rate)} frames at {transform.frame_rate:g} a second, and "
                      f"a clip needs {least}", "ask for shorter clips or a higher frame rate", "too short")


def share_set_aside(files: Set[str], used: Iterable[str], aside: Iterable[RejectedClip]) -> float:
    """The mean over files of how much of each is set aside, from 0 to 1.

    Args:
        files: the names of all.
        used: of each clip that is used, its file.
    """
    clips = Counter(used)
    lost = Counter(entry.path for entry in aside if entry.kind != "caption" or entry.path not in clips)
    return sum(count / (count + clips[path]) for path, count in lost.items()) / max(1, len(files))


def assign_shards(
    items: Sequence[PlannedClip], bytes_of: Any, shard_bytes: float, shard_clips: int
) -> list[list[PlannedClip]]:
    """Shards of clips of one bucket, in order; small buckets share one. A shard ends at whichever limit comes first."""
    shards: list[list[PlannedClip]] = []
    size = 0.0
    for item in sorted(items, key=lambda item: (item.frames, item.height, item.width)):  # stable: source order stays
        if not shards or len(shards[-1]) == shard_clips or size + bytes_of(item) > shard_bytes:
            shards.append([])
            size = 0.0
        shards[-1].append(item)
        size += bytes_of(item)
    return shards


def plan_key(items: Iterable[PlannedClip]) -> str:
    """Names a plan by all the clips that its source gives."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.id.encode())
    return digest.hexdigest()[:16]
