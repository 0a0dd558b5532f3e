"""The frames of a video file: from which packet each is decoded, when it is shown, and where decoding can begin."""

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
from .bitstream import begins_anew, formats_in_header, formats_in_packet, is_uniform
from .file import VideoFile, reason, signature_of

UNTIMED = ("avi", "mpeg")  # containers without a time for each frame: FFmpeg guesses them where frames are reordered
HEAD = 3  # frames decoded at the beginning, to see whether packets and frames correspond
GAP = 0.5  # s


@dataclass(frozen=True)
class Entry:
    """A keyframe that decoding can begin at.

    Attributes:
        packet: its number.
        rank: the place of its frame among those that are shown; from it on, decoded frames are right.
        timestamp, position: to find it: in the stream's units; in bytes.
        signature: to know it by.
    """

    packet: int
    rank: int
    timestamp: int | None
    position: int | None
    signature: tuple[Any, ...]


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file in the order in which they are shown.

    Attributes:
        times: (N,) s from the first frame's beginning, rising.
        packets: (N,) the number of each frame's packet.
        duration: s, to the end of the last frame.
        entries: where decoding can begin, in rising order; the file's beginning is always one.
        simple: no packet is shown before the keyframe that it follows, none is left out, all times were in the file.
        uniform: by its headers, all pictures are like the first one, and none is interlaced unless it is.
        last: s, the longest any stream of the file goes.
        head: the first frame, to see what the pictures are like.
    """

    times: np.ndarray
    packets: np.ndarray
    duration: float
    entries: tuple[Entry, ...]
    simple: bool
    uniform: bool
    last: float
    head: tuple[av.VideoFrame, ...] = field(repr=False)


@dataclass
class _Table:
    """What the container says of each packet, by number."""

    pts: list[int | None] = field(default_factory=list)  # in the stream's units; of a stream without reordering, dts
    dts: list[int | None] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)  # False: empty, cut by an edit list, or said to be hidden
    keys: dict[int, tuple[int | None, tuple[Any, ...]]] = field(default_factory=dict)  # position and signature
    head: list[tuple[int, av.VideoFrame]] = field(default_factory=list)
    last: float = 0.0
    damaged: bool = False  # the last packet is not whole
    closed: bool = True  # at each keyframe decoding begins anew, see `begins_anew`
    formats: set[bytes] = field(default_factory=set)  # of pictures, see `formats_in_packet`


def index_frames(file: VideoFile, readable: int | None = None) -> FrameIndex:
    """Number the frames of a file. Reads it to its end; decodes its beginning, or all of it where the container does
    not say when each frame is shown.

    Args:
        readable: how many frames count; None: all that the container has.

    Raises:
        VideoError: cut off, without a frame that can be decoded, or beyond the file's `policy`.
    """
    path, table = file.path, _read_table(file)
    if table.damaged and not file.cut_off:
        seconds = len(table.pts) * file.step
        raise VideoError(f"{path} is cut off: it breaks off in the middle of frame {len(table.pts)}, after about "
                         f"{seconds:.2f} s", "copy or download it again", "truncated")
    if not table.head and file.cut_off:
        raise VideoError(f"{path} is cut off before its first frame is whole", "copy or download it again", "truncated")
    if not table.head:
        raise VideoError(f"{path} holds no frame that can be decoded", "leave it out or encode it again", "codec")
    if file.policy.whole and (len(table.pts) < .9 * file.stream.frames or table.last < .9 * file.declared - .5):
        raise VideoError(f"{path} is cut off: it says that it lasts {file.declared:.1f} s, and {table.last:.1f} s of "
                         f"it ({len(table.pts)} frames) are there", "copy or download it again", "truncated")
    order, unit = _order_by_times(file, table), float(file.stream.time_base or 0)
    simple = order is not None
    if order is None:
        order = _order_by_decoding(file)
        begins = _times_in_order(file, table, order)
    else:
        begins = np.array([table.pts[n] for n in order], np.float64) * unit
    end = float(begins[-1]) + (table.duration[order[-1]] * unit or file.step)
    if readable is not None and readable < len(order):
        order, begins, end = order[:readable], begins[:readable], float(begins[readable])
    entries = _entries(table, order, file.format)
    simple = simple and table.closed and all(table.shown) and len(order) == len(table.pts) and _closed(order, entries)
    return FrameIndex(begins - begins[0], np.array(order), end - float(begins[0]), entries, simple,
                      is_uniform(table.formats, file.codec), table.last, tuple(frame for _, frame in table.head))


def _read_table(file: VideoFile) -> _Table:
    table, unit = _Table(), float(file.stream.time_base or 0)
    vp8, reordered = file.codec == "vp8", bool(file.stream.codec_context.has_b_frames)
    table.formats |= formats_in_header(file.stream.codec_context.extradata or b"", file.codec)
    first: int | None = None
    try:
        for packet in file.container.demux():
            begin = packet.dts if packet.pts is None else packet.pts
            if not packet.size and begin is None:
                continue
            scale = float(packet.time_base or 0)
            table.last = max(table.last, ((begin or 0) + (packet.duration or 0)) * scale)
            if packet.stream.index != file.stream.index:
                continue
            number, data = len(table.pts), memoryview(packet)
            table.pts.append(packet.pts if reordered else begin)
            table.dts.append(packet.dts)
            table.duration.append(packet.duration or 0)
            # VP8 keeps pictures that are never shown in packets of their own; the header's bit says so (RFC 6386, 9.1).
            hidden = not packet.size or packet.is_discard or (vp8 and not data[0] & 0x10)
            table.shown.append(not hidden)
            if packet.is_keyframe and packet.size:
                table.keys[number] = packet.pos, signature_of(packet, file.format)
                table.closed = table.closed and begins_anew(data, file.codec)
                # Of a stream that is not closed they make no difference.
                table.formats |= formats_in_packet(packet, file.codec) if table.closed else set()
            table.damaged = packet.is_corrupt
            first = begin if first is None else first
            file.policy.check_length(file.path, ((begin or 0) - (first or 0)) * unit)
            if len(table.head) < HEAD:
                table.head += _decode_leniently(file, packet, number)
    except av.FFmpegError as error:
        if not file.cut_off:
            raise VideoError(f"{file.path} cannot be read to its end ({reason(error)}, after {len(table.pts)} frames)",
                             "copy or download it again", "truncated") from error
    if len(table.head) < HEAD:
        table.head += _decode_leniently(file, None)
    return table


def _decode_leniently(file: VideoFile, packet: av.Packet | None, number: int = 0) -> list[tuple[int, av.VideoFrame]]:
    """A recording may begin in mid-picture: what cannot be decoded there is no frame."""
    try:
        found = file.decode(packet, number)
    except av.FFmpegError:
        return []
    for _, frame in found:
        file.policy.check_size(file.path, frame.width, frame.height)
    return found


def _order_by_times(file: VideoFile, table: _Table) -> list[int] | None:
    """Packet numbers by the times that the container gives; None where these may be wrong, or packets and frames do not
    correspond at the beginning of the file."""
    if file.format in UNTIMED and file.stream.codec_context.has_b_frames:
        return None
    times, head = table.pts, [n for n, _ in table.head]
    start = times[head[0]]
    if start is None:
        return None

    def left_out(n: int) -> bool:
        """Pictures before the first that comes out need others that the file does not have."""
        time = times[n]
        return time < start if time is not None else n < head[-1] and n not in head

    shown = [n for n in range(len(times)) if table.shown[n] and not left_out(n)]
    stamps = [times[n] for n in shown]
    decoded = [d for d in table.dts if d is not None]
    if None in stamps or len(set(stamps)) < len(stamps) or any(b <= a for a, b in pairwise(decoded)):
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
        raise VideoError(f"{file.path} holds no frame that can be decoded", "leave it out or encode it again", "codec")
    return order


def _times_in_order(file: VideoFile, table: _Table, order: Sequence[int]) -> np.ndarray:
    """Seconds (N,) at which frames in the order of decoding begin.

    In AVI each packet has its slot, and the k-th frame is shown in the k-th. In MPEG program streams only some packets
    have times, and each frame says how long it is shown. Elsewhere the times of the packets count where they rise, and
    others are put between them.
    """
    unit = float(file.stream.time_base or 0)
    if file.format == "avi":
        slots = sorted(d for n in order if (d := table.dts[n]) is not None)
        if len(slots) == len(order):
            return np.array(slots, np.float64) * unit
    if file.format == "mpeg":
        lengths = np.array([table.duration[n] * unit or file.step for n in order])
        said = [time * unit for n in order if (time := table.pts[n]) is not None]
        begins = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
        if said and abs(max(said) - min(said) - begins[-1]) < GAP:  # else something is missing in between
            return begins
    known = _longest_rising([(k, table.pts[n]) for k, n in enumerate(order)])
    if not known:
        return np.arange(len(order)) * file.step
    where, stamps = np.array([k for k, _ in known]), np.array([time for _, time in known], np.float64) * unit
    times = np.interp(np.arange(len(order)), where, stamps)
    before, after = np.arange(where[0]), np.arange(where[-1] + 1, len(order))
    times[before] = stamps[0] - (where[0] - before) * file.step
    times[after] = stamps[-1] + (after - where[-1]) * file.step
    return times


def _longest_rising(pairs: Sequence[tuple[int, int | None]]) -> list[tuple[int, int]]:
    """The longest part of (index, value) whose values rise."""
    ends: list[int] = []  # the smallest value that a rising part of each length can end with
    chains: list[Any] = []  # and that part, as (pair, the part before it)
    for k, value in pairs:
        if value is None:
            continue
        at = bisect_left(ends, value)
        chain = ((k, value), chains[at - 1] if at else None)
        ends[at:at + 1], chains[at:at + 1] = [value], [chain]
    found: list[tuple[int, int]] = []
    last: Any = chains[-1] if chains else None
    while last:
        found.append(last[0])
        last = last[1]
    return found[::-1]


def _entries(table: _Table, order: Sequence[int], container: str) -> tuple[Entry, ...]:
    rank_of = {packet: rank for rank, packet in enumerate(order)}
    alike = Counter(signature for _, signature in table.keys.values())
    found = [Entry(0, 0, None, None, ())]
    for number, (position, signature) in table.keys.items():
        rank = rank_of.get(number)
        if not number or rank is None or alike[signature] > 1:
            continue
        pts, dts = table.pts[number], table.dts[number]
        stamp = pts if container in ("mov", "matroska") or dts is None else dts
        found.append(Entry(number, rank, stamp, position if container == "mpegts" else None, signature))
    return tuple(found)


def _closed(order: Sequence[int], entries: Sequence[Entry]) -> bool:
    """Whether all packets before each keyframe are shown before it, and no other is."""
    ranks = np.empty(len(order), np.int64)
    ranks[np.array(order)] = np.arange(len(order))
    latest = np.maximum.accumulate(ranks)
    return all(entry.packet == entry.rank == latest[entry.packet - 1] + 1 for entry in entries if entry.packet)
