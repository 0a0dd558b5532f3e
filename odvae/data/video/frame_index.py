"""Index the frames of a video file: each frame's packet and presentation time, and where decoding can begin."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import av
import numpy as np

from ..errors import VideoError
from .bitstream import formats_in_header, formats_in_packet, is_random_access_point, is_uniform
from .file import VideoFile, packet_signature, reason

UNTIMED = ("avi", "mpeg")  # containers without a timestamp per frame: FFmpeg guesses them if frames are reordered
HEAD_FRAMES = 3  # decoded at the beginning, to check that packets and frames correspond
MAX_GAP = 0.5  # s


@dataclass(frozen=True)
class Keyframe:
    """A keyframe that decoding can begin at.

    Attributes:
        packet: its packet's number.
        frame: its frame's number, in display order; from it on, decoded frames are right.
        timestamp, position: to seek to: in the stream's units; in bytes.
        signature: to recognise its packet.
    """

    packet: int
    frame: int
    timestamp: int | None
    position: int | None
    signature: tuple[Any, ...]


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file in display order.

    Attributes:
        times: (N,) s from the first frame's start, rising.
        packets: (N,) the number of each frame's packet.
        duration: s, to the end of the last frame.
        keyframes: where decoding can begin, in rising order; the file's beginning is always one.
        is_simple: no packet is shown before the keyframe that it follows, none is skipped, the file has all times.
        has_uniform_format: by its headers, all frames have the format of the first, and none is interlaced unless it
            is.
        last: s, the end of the longest stream of the file.
        head: the first frames, as samples of the format.
    """

    times: np.ndarray
    packets: np.ndarray
    duration: float
    keyframes: tuple[Keyframe, ...]
    is_simple: bool
    has_uniform_format: bool
    last: float
    head: tuple[av.VideoFrame, ...] = field(repr=False)


@dataclass
class _PacketTable:
    """The container's data of each packet, by number."""

    pts: list[int | None] = field(default_factory=list)  # in the stream's units; dts in a stream without reordering
    dts: list[int | None] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    is_shown: list[bool] = field(default_factory=list)  # False: empty, cut by an edit list, or marked as hidden
    keys: dict[int, tuple[int | None, tuple[Any, ...]]] = field(default_factory=dict)  # position and signature
    head: list[tuple[int, av.VideoFrame]] = field(default_factory=list)
    last: float = 0.0
    is_damaged: bool = False  # the last packet is incomplete
    is_closed: bool = True  # no keyframe needs an earlier frame, see `is_random_access_point`
    formats: set[bytes] = field(default_factory=set)  # of frames, see `formats_in_packet`


def index_frames(file: VideoFile, readable: int | None = None) -> FrameIndex:
    """Index the frames of a file. Reads it to its end; decodes its beginning, or all of it if the container lacks
    presentation times.

    Args:
        readable: number of frames to keep; None: all that the container has.

    Raises:
        VideoError: truncated, without a decodable frame, or beyond the file's `policy`.
    """
    path, table = file.path, _read_table(file)
    if table.is_damaged and not file.is_truncated:
        seconds = len(table.pts) * file.step
        raise VideoError(f"{path} is truncated in the middle of frame {len(table.pts)}, after about {seconds:.2f} s",
                         "copy or download it again", "truncated")
    if not table.head and file.is_truncated:
        raise VideoError(f"{path} is truncated before the end of its first frame", "copy or download it again",
                         "truncated")
    if not table.head:
        raise VideoError(f"{path} has no decodable frame", "leave it out or encode it again", "codec")
    is_complete = len(table.pts) >= .9 * file.stream.frames and table.last >= .9 * file.declared - .5
    if file.policy.require_complete and not is_complete:
        raise VideoError(f"{path} is truncated: its header declares {file.declared:.1f} s, and it has {table.last:.1f} "
                         f"s ({len(table.pts)} frames)", "copy or download it again", "truncated")
    order, unit = _order_by_times(file, table), float(file.stream.time_base or 0)
    is_simple = order is not None
    if order is None:
        order = _order_by_decoding(file)
        starts = _times_in_order(file, table, order)
    else:
        starts = np.array([table.pts[n] for n in order], np.float64) * unit
    end = float(starts[-1]) + (table.duration[order[-1]] * unit or file.step)
    if readable is not None and readable < len(order):
        order, starts, end = order[:readable], starts[:readable], float(starts[readable])
    keyframes = _keyframes(table, order, file.format)
    is_simple = (is_simple and table.is_closed and all(table.is_shown) and len(order) == len(table.pts)
                 and _is_closed(order, keyframes))
    return FrameIndex(starts - starts[0], np.array(order), end - float(starts[0]), keyframes, is_simple,
                      is_uniform(table.formats, file.codec), table.last, tuple(frame for _, frame in table.head))


def _read_table(file: VideoFile) -> _PacketTable:
    table, unit = _PacketTable(), float(file.stream.time_base or 0)
    vp8, reordered = file.codec == "vp8", bool(file.stream.codec_context.has_b_frames)
    table.formats |= formats_in_header(file.stream.codec_context.extradata or b"", file.codec)
    first: int | None = None
    try:
        for packet in file.container.demux():
            start = packet.dts if packet.pts is None else packet.pts
            if not packet.size and start is None:
                continue
            scale = float(packet.time_base or 0)
            table.last = max(table.last, ((start or 0) + (packet.duration or 0)) * scale)
            if packet.stream.index != file.stream.index:
                continue
            number, data = len(table.pts), memoryview(packet)
            table.pts.append(packet.pts if reordered else start)
            table.dts.append(packet.dts)
            table.duration.append(packet.duration or 0)
            # VP8 has packets for frames that are never shown, marked by a bit in the header (RFC 6386, 9.1).
            hidden = not packet.size or packet.is_discard or (vp8 and not data[0] & 0x10)
            table.is_shown.append(not hidden)
            if packet.is_keyframe and packet.size:
                table.keys[number] = packet.pos, packet_signature(packet, file.format)
                table.is_closed = table.is_closed and is_random_access_point(data, file.codec)
                # Irrelevant for a stream that is not closed.
                table.formats |= formats_in_packet(packet, file.codec) if table.is_closed else set()
            table.is_damaged = packet.is_corrupt
            first = start if first is None else first
            file.policy.check_length(file.path, ((start or 0) - (first or 0)) * unit)
            if len(table.head) < HEAD_FRAMES:
                table.head += _decode_leniently(file, packet, number)
    except av.FFmpegError as error:
        if not file.is_truncated:
            raise VideoError(f"{file.path} cannot be read to its end ({reason(error)}, after {len(table.pts)} frames)",
                             "copy or download it again", "truncated") from error
    if len(table.head) < HEAD_FRAMES:
        table.head += _decode_leniently(file, None)
    return table


def _decode_leniently(file: VideoFile, packet: av.Packet | None, number: int = 0) -> list[tuple[int, av.VideoFrame]]:
    """Decode a packet; none if that fails, because a recording may begin in mid-frame."""
    try:
        frames = file.decode(packet, number)
    except av.FFmpegError:
        return []
    for _, frame in frames:
        file.policy.check_size(file.path, frame.width, frame.height)
    return frames


def _order_by_times(file: VideoFile, table: _PacketTable) -> list[int] | None:
    """Sort packet numbers by the container's timestamps; None if these may be wrong, or if packets and frames do not
    correspond at the beginning of the file."""
    if file.format in UNTIMED and file.stream.codec_context.has_b_frames:
        return None
    times, head = table.pts, [n for n, _ in table.head]
    start = times[head[0]]
    if start is None:
        return None

    def is_left_out(n: int) -> bool:
        """Return whether a frame precedes the first decoded one, because it needs others that the file lacks."""
        time = times[n]
        return time < start if time is not None else n < head[-1] and n not in head

    shown = [n for n in range(len(times)) if table.is_shown[n] and not is_left_out(n)]
    timestamps = [times[n] for n in shown]
    decoded = [d for d in table.dts if d is not None]
    if None in timestamps or len(set(timestamps)) < len(timestamps) or any(b <= a for a, b in pairwise(decoded)):
        return None
    order = sorted(shown, key=lambda n: times[n] or 0)
    return order if head == order[:len(head)] else None


def _order_by_decoding(file: VideoFile) -> list[int]:
    file.rewind(None)
    order: list[int] = []
    try:
        for number, _ in file.frames(enumerate(file.packets())):
            order.append(number)
    except av.FFmpegError as error:
        raise VideoError(f"{file.path} cannot be decoded beyond frame {len(order)} ({reason(error)})",
                         "encode it again, or leave it out") from error
    if not order:
        raise VideoError(f"{file.path} has no decodable frame", "leave it out or encode it again", "codec")
    return order


def _times_in_order(file: VideoFile, table: _PacketTable, order: Sequence[int]) -> np.ndarray:
    """Return the start times (N,) in s of frames whose order is known from decoding.

    In AVI each packet has its slot, and the k-th frame is shown in the k-th. In MPEG program streams only some packets
    have timestamps, and each frame has a duration. Elsewhere rising timestamps are used, and the others interpolated.
    """
    unit = float(file.stream.time_base or 0)
    if file.format == "avi":
        slots = sorted(d for n in order if (d := table.dts[n]) is not None)
        if len(slots) == len(order):
            return np.array(slots, np.float64) * unit
    if file.format == "mpeg":
        lengths = np.array([table.duration[n] * unit or file.step for n in order])
        known_times = [time * unit for n in order if (time := table.pts[n]) is not None]
        starts = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
        if known_times and abs(max(known_times) - min(known_times) - starts[-1]) < MAX_GAP:  # else frames are missing
            return starts
    known = _longest_rising([(k, table.pts[n]) for k, n in enumerate(order)])
    if not known:
        return np.arange(len(order)) * file.step
    where, timestamps = np.array([k for k, _ in known]), np.array([time for _, time in known], np.float64) * unit
    times = np.interp(np.arange(len(order)), where, timestamps)
    before, after = np.arange(where[0]), np.arange(where[-1] + 1, len(order))
    times[before] = timestamps[0] - (where[0] - before) * file.step
    times[after] = timestamps[-1] + (after - where[-1]) * file.step
    return times


def _longest_rising(pairs: Sequence[tuple[int, int | None]]) -> list[tuple[int, int]]:
    """Return the longest subsequence of (index, value) with rising values."""
    ends: list[int] = []  # by length, the smallest value that a rising subsequence can end with
    chains: list[Any] = []  # that subsequence, as (pair, the chain before it)
    for k, value in pairs:
        if value is None:
            continue
        at = bisect_left(ends, value)
        chain = ((k, value), chains[at - 1] if at else None)
        ends[at:at + 1], chains[at:at + 1] = [value], [chain]
    longest: list[tuple[int, int]] = []
    last: Any = chains[-1] if chains else None
    while last:
        longest.append(last[0])
        last = last[1]
    return longest[::-1]


def _keyframes(table: _PacketTable, order: Sequence[int], container: str) -> tuple[Keyframe, ...]:
    frame_of = {packet: frame for frame, packet in enumerate(order)}
    counts = Counter(signature for _, signature in table.keys.values())
    keyframes = [Keyframe(0, 0, None, None, ())]
    for number, (position, signature) in table.keys.items():
        frame = frame_of.get(number)
        if not number or frame is None or counts[signature] > 1:
            continue
        pts, dts = table.pts[number], table.dts[number]
        timestamp = pts if container in ("mov", "matroska") or dts is None else dts
        keyframes.append(Keyframe(number, frame, timestamp, position if container == "mpegts" else None, signature))
    return tuple(keyframes)


def _is_closed(order: Sequence[int], keyframes: Sequence[Keyframe]) -> bool:
    """Return whether all packets before each keyframe are shown before it, and no others."""
    frames = np.empty(len(order), np.int64)
    frames[np.array(order)] = np.arange(len(order))
    latest = np.maximum.accumulate(frames)
    return all(key.packet == key.frame == latest[key.packet - 1] + 1 for key in keyframes if key.packet)
