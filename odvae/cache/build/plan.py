"""Plan a build: the clips of each file, their buckets and their shards."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from ...data.sources import MediaRef, SourceSpan
from ...data.video.reader import TOLERANCE, VideoError, count_frames
from ...utils.errors import UserError
from ...utils.files import path_text
from .. import format as fmt
from .decode_worker import MediaInfo
from .probe import ProbeResults

POLICIES = "back-to-back, every:SECONDS, uniform:CLIPS, whole or scenes"


@dataclass(frozen=True)
class ClipPolicy:
    """Which spans of a video become clips.

    "back-to-back": one after the other; "every:S": one begins every S seconds; "uniform:N": N, evenly spaced; "whole":
    the whole file is one clip; "scenes": back to back within each scene, none across a cut.
    """

    kind: str = "back-to-back"
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> ClipPolicy:
        """Raises UserError."""
        match = re.fullmatch(r"(back-to-back|whole|scenes)|(every|uniform):(\d+(?:\.\d+)?)", text)
        if not match or (match[2] and (not float(match[3]) > 0 or (match[2] == "uniform" and float(match[3]) % 1))):
            raise UserError(f"--clips {text} is not known; give {POLICIES}")
        return cls(match[1]) if match[1] else cls(match[2], float(match[3]))

    def spans(self, begin: float, end: float, lengths: Sequence[int], rate: float, ratio: int,
              cuts: Sequence[float] = ()) -> list[tuple[float, int]]:
        """Return (start in s, frames) of the clips between `begin` and `end` s of a file.

        Args:
            lengths: in frames; each clip takes the longest that fits. Empty for "whole": any length 1 + ratio * k.
            rate: frames per second.
            cuts: s, where scenes begin.
        """
        if self.kind == "whole":
            available = count_frames(end - begin, rate)
            fit = [n for n in lengths if n <= available]
            length = max(fit) if lengths and fit else 0 if lengths else 1 + (available - 1) // ratio * ratio
            return [(begin, length)] if length > 1 else []
        if self.kind == "scenes":
            borders = [begin, *(cut for cut in sorted(cuts) if begin < cut < end), end]
            # A clip's last frame must lie before the next scene's first.
            return [span for a, b in pairwise(borders) for span in _back_to_back(a, b, lengths, rate)]
        if self.kind == "every":
            count = max(0, math.ceil((end - begin - TOLERANCE) / self.value))
            spans = [(begin + k * self.value, _longest(end - begin - k * self.value, lengths, rate))
                     for k in range(count)]
            return [(start, length) for start, length in spans if length]
        if self.kind == "uniform":
            length = _longest(end - begin, lengths, rate)
            spare = end - begin - TOLERANCE - (length - 1) / rate - 1e-9
            n = int(self.value)
            return [(begin + (spare * k / (n - 1) if n > 1 else spare / 2), length) for k in range(n)] if length else []
        return list(_back_to_back(begin, end, lengths, rate))


def _back_to_back(begin: float, end: float, lengths: Sequence[int], rate: float) -> Iterator[tuple[float, int]]:
    """Yield spans back to back."""
    frame = 0  # an integer, so that starts do not drift
    while length := _longest(end - begin - frame / rate, lengths, rate):
        yield begin + frame / rate, length
        frame += length


def _longest(seconds: float, lengths: Sequence[int], rate: float) -> int:
    """Return the longest of `lengths` that fits into a span; 0 if none does."""
    available = count_frames(seconds, rate)
    return max((n for n in lengths if n <= available), default=0)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the size with the nearest aspect ratio; of several with the same ratio the largest that needs no
    upscaling, else the smallest."""
    def distance(size: tuple[int, int]) -> float:
        return round(abs(math.log(size[0] * width / size[1] / height)), 3)

    best = min(map(distance, sizes))
    nearest = sorted((size for size in sizes if distance(size) == best), key=lambda size: size[0] * size[1])
    return next((size for size in reversed(nearest) if size[0] <= height and size[1] <= width), nearest[0])


@dataclass(frozen=True)
class PlannedClip:
    """A clip that belongs in the cache."""

    id: str
    ref: MediaRef
    content: str  # SHA-256 of the file
    readable: int | None  # frames, of a truncated file
    start: float  # s
    frames: int  # 1 for a photo
    height: int
    width: int
    captions: tuple[str, ...]
    caption_from_name: bool
    captions_unread: bool = False  # the captions of an earlier build stay

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
    """The clips of a source."""

    items: list[PlannedClip] = field(default_factory=list)  # without duplicates
    duplicates: int = 0
    set_aside: list[RejectedClip] = field(default_factory=list)
    files: set[str] = field(default_factory=set)  # names of all files that the source lists
    notes: Counter[str] = field(default_factory=Counter)  # number of files by conversion, see `VideoInfo.notes`


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """Format the conversions of frames for a summary: "deinterlaced: 3 files"."""
    return [f"{note}: {count} file{'s' * (count > 1)}" for note, count in sorted(notes.items())]


def make_plan(entries: Iterable[SourceSpan], probed: ProbeResults, header: fmt.Header, policy: ClipPolicy) -> Plan:
    """Plan the clips of all entries in order, each with its bucket and its ID."""
    transform, key = header.transform, header.key()
    plan, seen = Plan(), set[str]()
    size_of = cache(lambda height, width: nearest_size(height, width, transform.sizes))
    failed: set[MediaRef] = set()
    for entry in entries:
        first, info = entry.ref.name not in plan.files, probed[entry.ref]
        plan.files.add(entry.ref.name)
        if first and isinstance(info, MediaInfo):
            plan.notes.update(info.notes)
        if isinstance(info, VideoError):
            if entry.ref not in failed:
                plan.set_aside.append(RejectedClip.of(entry.ref.name, info))
            failed.add(entry.ref)
            continue
        spans = _spans(entry, info, header, policy)
        if not spans:
            plan.set_aside.append(RejectedClip.of(entry.ref.name, _too_short(entry, info, transform, policy),
                                              entry.start))
        height, width = size_of(info.height, info.width)
        for start, frames in spans:
            clip_id = fmt.clip_id(info.content, start, frames, transform.frame_rate, (height, width), key)
            if clip_id in seen:
                plan.duplicates += 1
                continue
            seen.add(clip_id)
            plan.items.append(PlannedClip(clip_id, entry.ref, info.content, info.readable, start, frames, height, width,
                                          entry.captions, entry.caption_from_name, entry.captions_unread))
    return plan


def _spans(entry: SourceSpan, info: MediaInfo, header: fmt.Header, policy: ClipPolicy) -> list[tuple[float, int]]:
    if info.is_photo:
        return [(0.0, 1)]
    return policy.spans(entry.start, min(entry.end, info.duration), header.transform.frames,
                         header.transform.frame_rate, header.vae.temporal_compression_ratio, info.cuts)


def _too_short(entry: SourceSpan, info: MediaInfo, transform: fmt.TransformHeader, policy: ClipPolicy) -> VideoError:
    seconds = max(0.0, min(entry.end, info.duration) - entry.start)
    whose = "its" if entry.end == math.inf and not entry.start else f"from {entry.start:g} s on its"
    needed = min(transform.frames, default=2)
    within = " between its cuts" if policy.kind == "scenes" else ""
    return VideoError(f"{entry.ref} is too short{within}: {whose} {seconds:.2f} s give "
                      f"{count_frames(seconds, transform.frame_rate)} frames at {transform.frame_rate:g} fps, and "
                      f"a clip needs {needed}", "use shorter clips or a higher frame rate", "too short")


def sum_set_aside(files: Set[str], used: Iterable[str], rejected: Iterable[RejectedClip]) -> float:
    """Return the sum over files of the share of each that is set aside.

    Args:
        files: the names of all files.
        used: the file name of each clip that is used.
    """
    clips = Counter(used)
    lost = Counter(entry.path for entry in rejected if entry.kind != "caption" or entry.path not in clips)
    return sum(count / (count + clips[path]) for path, count in lost.items())


def assign_shards(items: Sequence[PlannedClip], bytes_of: Callable[[PlannedClip], float], shard_bytes: float,
                  shard_clips: int) -> list[list[PlannedClip]]:
    """Distribute clips over shards, sorted by bucket; a shard ends at whichever limit comes first."""
    shards: list[list[PlannedClip]] = []
    size = 0.0
    for item in sorted(items, key=lambda item: (item.frames, item.height, item.width)):  # stable: source order stays
        if not shards or len(shards[-1]) == shard_clips or size + bytes_of(item) > shard_bytes:
            shards.append([])
            size = 0.0
        shards[-1].append(item)
        size += bytes_of(item)
    return shards
