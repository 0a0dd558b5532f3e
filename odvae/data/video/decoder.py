"""Frames of a video file by number, in any order, exactly: decoding begins at the nearest keyframe that gives them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator

import av

from ..errors import VideoError
from .file import VideoFile, reason, signature_of
from .frame_index import FrameIndex

GIVEN_UP = 2  # keyframes further back that are tried for a picture that does not come
Ranked = tuple[int, av.VideoFrame]  # a frame with its place among those that are shown


class FrameDecoder:
    """Decodes the frames that an index numbers, best in rising order.

    Pictures that are shown before a keyframe but stored after it (an open GOP's leading pictures) cannot be decoded
    from that keyframe on; nor can those that follow a keyframe of gradual refresh at once. So a keyframe serves where
    its own picture is not shown after the one that is wanted, and an earlier one is taken where that picture does not
    come.
    """

    def __init__(self, file: VideoFile, index: FrameIndex) -> None:
        self._file, self._entries, self._count = file, index.entries, len(index.packets)
        self._ranks = {int(packet): rank for rank, packet in enumerate(index.packets)}
        self._known = {entry.signature: entry.packet for entry in index.entries if entry.packet}
        self._frames: Generator[Ranked, None, None] | None = None
        self._now: Ranked | None = None
        self._ahead: Ranked | None = None
        self._fed = -1  # the number of the last packet that was decoded
        self._missing: set[int] = set()  # frames that no decoding gives

    def frame(self, rank: int) -> av.VideoFrame:
        """The frame `rank`; where it cannot be decoded but later ones can, the one before it, which is shown instead.

        Raises:
            VideoError: the file cannot be decoded so far.
        """
        at = bisect_right(self._entries, rank, key=lambda entry: entry.rank) - 1
        if self._now is None or rank < self._now[0] or self._entries[at].packet > self._fed:
            self._begin(at)
        self._advance(rank)
        for back in range(min(at, GIVEN_UP)):  # leading pictures may need the keyframe before
            if rank in self._missing or (self._now is not None and self._now[0] == rank):
                break
            self._begin(at - 1 - back)
            self._advance(rank)
        if self._now is not None and self._now[0] < rank:
            self._missing.add(rank)
        if self._now is None or (self._ahead is None and self._now[0] < rank):
            raise VideoError(f"{self._file.path} cannot be decoded beyond frame {self._now[0] if self._now else 0} of "
                             f"{self._count}", "encode it again, or leave it out")
        return self._now[1]

    def _advance(self, rank: int) -> None:
        while self._frames is not None and self._ahead is not None and self._ahead[0] <= rank:
            self._now, self._ahead = self._ahead, next(self._frames, None)

    def _begin(self, at: int) -> None:
        if self._frames is not None:
            self._frames.close()
        while True:
            self._now = None
            self._frames = self._decode(at)
            self._ahead = next(self._frames, None)
            entry = self._entries[at]
            if at == 0 or (self._ahead is not None and self._ahead[0] == entry.rank):
                return
            # A recovery point, whose own picture is not whole: it is none to begin from.
            self._frames.close()
            self._entries = (*self._entries[:at], *self._entries[at + 1:])
            at -= 1

    def _decode(self, at: int) -> Generator[Ranked, None, None]:
        """The frames from an entry on, in the order in which they are shown."""
        least = done = self._entries[at].rank
        try:
            for number, frame in self._file.frames(self._feed(at), begun=at > 0):
                rank = self._ranks.get(number, -1)
                if rank >= least:
                    done += 1
                    yield rank, frame
        except av.FFmpegError as error:
            raise VideoError(f"{self._file.path} cannot be decoded beyond frame {done} of {self._count} "
                             f"({reason(error)})", "encode it again, or leave it out") from error

    def _feed(self, at: int) -> Generator[tuple[int, av.Packet], None, None]:
        for number, packet in self._packets_from(at):
            self._fed = number
            yield number, packet

    def _packets_from(self, at: int) -> Generator[tuple[int, av.Packet], None, None]:
        """(number, packet) from an entry's keyframe on."""
        target = self._entries[at].packet
        # Where a container's own index leads behind the keyframe, ask for earlier ones; at last for the beginning.
        for back in (0, 1, 3):
            aim = self._entries[max(0, at - back)]
            if aim.packet == 0:
                break
            try:
                self._file.rewind(aim.timestamp, aim.position)
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
        """Packets from the number `target` on, where the container stands before it; else nothing."""
        number: int | None = None
        for packet in self._file.packets():
            if number is None:
                if not packet.is_keyframe or not packet.size:
                    continue
                number = self._known.get(signature_of(packet, self._file.format))
                if number is None:
                    continue
                if number > target:
                    return
            else:
                number += 1
            if number >= target:
                yield number, packet
