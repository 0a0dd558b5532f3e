"""Decode frames of a video file by number, in any order, exactly: from the nearest keyframe that yields them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator

import av

from ..errors import VideoError
from .file import VideoFile, packet_signature, reason
from .frame_index import FrameIndex

MAX_KEYFRAMES_BACK = 2  # earlier keyframes that are tried for a frame that is not decoded
NumberedFrame = tuple[int, av.VideoFrame]  # a frame with its number in display order


class FrameDecoder:
    """Decodes the frames of an index by number, fastest in rising order.

    Frames that are shown before a keyframe but stored after it (an open GOP's leading pictures) cannot be decoded from
    that keyframe on; nor can those right after a keyframe of gradual refresh. So decoding begins at the last keyframe
    that is not shown after the requested frame, and at an earlier one if that does not yield the frame.
    """

    def __init__(self, file: VideoFile, index: FrameIndex) -> None:
        self._file, self._keyframes, self._count = file, index.keyframes, len(index.packets)
        self._frame_numbers = {int(packet): number for number, packet in enumerate(index.packets)}
        self._known = {keyframe.signature: keyframe.packet for keyframe in index.keyframes if keyframe.packet}
        self._frames: Generator[NumberedFrame, None, None] | None = None
        self._current: NumberedFrame | None = None
        self._next: NumberedFrame | None = None
        self._last_packet = -1  # the number of the last packet that was decoded
        self._missing: set[int] = set()  # frames that cannot be decoded

    def frame(self, number: int) -> av.VideoFrame:
        """Return a frame; if it cannot be decoded but later ones can, the one before it, as a player would show.

        Raises:
            VideoError: the file cannot be decoded up to this frame.
        """
        at = bisect_right(self._keyframes, number, key=lambda keyframe: keyframe.frame) - 1
        if self._current is None or number < self._current[0] or self._keyframes[at].packet > self._last_packet:
            self._seek(at)
        self._advance(number)
        for back in range(min(at, MAX_KEYFRAMES_BACK)):  # leading pictures may need the keyframe before
            if number in self._missing or (self._current is not None and self._current[0] == number):
                break
            self._seek(at - 1 - back)
            self._advance(number)
        if self._current is not None and self._current[0] < number:
            self._missing.add(number)
        if self._current is None or (self._next is None and self._current[0] < number):
            last = self._current[0] if self._current else 0
            raise VideoError(f"{self._file.path} cannot be decoded beyond frame {last} of {self._count}",
                             "encode it again, or leave it out")
        return self._current[1]

    def _advance(self, number: int) -> None:
        while self._frames is not None and self._next is not None and self._next[0] <= number:
            self._current, self._next = self._next, next(self._frames, None)

    def _seek(self, at: int) -> None:
        """Begin decoding at a keyframe, given by its index in `_keyframes`."""
        if self._frames is not None:
            self._frames.close()
        while True:
            self._current = None
            self._frames = self._decode(at)
            self._next = next(self._frames, None)
            keyframe = self._keyframes[at]
            if at == 0 or (self._next is not None and self._next[0] == keyframe.frame):
                return
            # A recovery point, whose own picture is incomplete: decoding cannot begin here.
            self._frames.close()
            self._keyframes = (*self._keyframes[:at], *self._keyframes[at + 1:])
            at -= 1

    def _decode(self, at: int) -> Generator[NumberedFrame, None, None]:
        """Yield the frames from a keyframe on, in display order."""
        first = done = self._keyframes[at].frame
        try:
            for packet_number, frame in self._file.frames(self._read_packets(at), started=at > 0):
                number = self._frame_numbers.get(packet_number, -1)
                if number >= first:
                    done += 1
                    yield number, frame
        except av.FFmpegError as error:
            raise VideoError(f"{self._file.path} cannot be decoded beyond frame {done} of {self._count} "
                             f"({reason(error)})", "encode it again, or leave it out") from error

    def _read_packets(self, at: int) -> Generator[tuple[int, av.Packet], None, None]:
        for packet_number, packet in self._packets_from(at):
            self._last_packet = packet_number
            yield packet_number, packet

    def _packets_from(self, at: int) -> Generator[tuple[int, av.Packet], None, None]:
        """Yield (number, packet) from a keyframe on."""
        target = self._keyframes[at].packet
        # If a container's own index leads past the keyframe, seek to earlier ones; at last to the beginning.
        for back in (0, 1, 3):
            keyframe = self._keyframes[max(0, at - back)]
            if keyframe.packet == 0:
                break
            try:
                self._file.rewind(keyframe.timestamp, keyframe.position)
            except av.FFmpegError:
                break
            numbered = self._numbered(target)
            first = next(numbered, None)
            if first is not None:
                yield first
                yield from numbered
                return
        self._file.rewind(None)
        for number, packet in enumerate(self._file.packets()):
            if number >= target:
                yield number, packet

    def _numbered(self, target: int) -> Generator[tuple[int, av.Packet], None, None]:
        """Yield packets from the number `target` on if the container is positioned before it; else nothing."""
        number: int | None = None
        for packet in self._file.packets():
            if number is None:
                if not packet.is_keyframe or not packet.size:
                    continue
                number = self._known.get(packet_signature(packet, self._file.format))
                if number is None:
                    continue
                if number > target:
                    return
            else:
                number += 1
            if number >= target:
                yield number, packet
