"""An open video file: its packets, and the decoder of the selected stream.

Packets are numbered from 0 in file order. The packet number replaces the timestamp on its way through the decoder, and
so identifies the decoded frame, even if the decoder reorders, delays or drops frames and the container's timestamps are
wrong.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from ..errors import VideoError

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders ignore transparency
MIN_PIXELS_FOR_THREADS = 512 * 512  # for smaller frames threads cost more than they gain


@dataclass(frozen=True)
class ReadPolicy:
    """Limits for opening untrusted files.

    Attributes:
        formats: FFmpeg's name of the only allowed demuxer (in capitals, Pillow's format); it may open no other files
            or URLs.
        codecs: canonical names of the allowed decoders.
        max_side: pixels.
        max_seconds: the longest duration.
        require_complete: reject files that are shorter than their header declares.
    """

    formats: str | None = None
    codecs: frozenset[str] | None = None
    max_side: int | None = None
    max_seconds: float | None = None
    require_complete: bool = False

    @property
    def image_formats(self) -> tuple[str, ...] | None:
        return None if self.formats is None else (self.formats.upper(),)

    def check_size(self, path: Path | str, width: int, height: int) -> None:
        """Raise VideoError if a frame is too large."""
        if self.max_side is not None and max(width, height) > self.max_side:
            raise VideoError(f"{path} is too large: {width}x{height} pixels, and a side may have at most "
                             f"{self.max_side}", "make it smaller", "size")

    def check_length(self, path: Path | str, seconds: float) -> None:
        """Raise VideoError if a video is too long."""
        if self.max_seconds is not None and seconds > self.max_seconds + .5:
            raise VideoError(f"{path} is too long: {seconds:.1f} s, and the limit is {self.max_seconds:g} s",
                             "cut it", "too long")


NO_LIMITS = ReadPolicy()


class VideoFile:
    """An open video file and the decoder of its selected stream. A context manager. Raises VideoError.

    Args:
        policy: limits for opening it.
        is_truncated: the file is truncated, and its readable part is decoded. By one thread: with several, their number
            decides which of the last frames are damaged.
    """

    def __init__(self, path: Path, policy: ReadPolicy = NO_LIMITS, is_truncated: bool = False) -> None:
        self.path, self.policy, self.is_truncated = path, policy, is_truncated
        self.container = _open_container(path, policy)
        try:
            self.stream = _select_stream(path, self.container)
            self.decoder = self._make_decoder()
            if self.format not in ("mpegts", "mpeg"):  # whose duration is only a guess
                policy.check_length(path, self.declared)
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.container.close()

    @property
    def format(self) -> str:
        return self.container.format.name.partition(",")[0]

    @property
    def codec(self) -> str:
        name: str = self.decoder.codec.canonical_name
        return name

    @property
    def declared(self) -> float:
        """Duration in s declared by the header; 0 if there is none."""
        return (self.container.duration or 0) / av.time_base

    @property
    def step(self) -> float:
        """Seconds from frame to frame, by the header."""
        return float(1 / (self.stream.average_rate or self.stream.guessed_rate or 25))

    def packets(self) -> Iterator[av.Packet]:
        """Yield the stream's packets from the container's position. Raises FFmpegError where the file is truncated."""
        for packet in self.container.demux(self.stream):
            if packet.size or packet.pts is not None or packet.dts is not None:  # else it is the flush packet
                yield packet

    def decode(self, packet: av.Packet | None, number: int = 0) -> list[tuple[int, av.VideoFrame]]:
        """Decode a packet to frames with their packet numbers, in display order; None flushes the decoder."""
        if packet is not None:
            if not packet.size:  # in Theora and AVI it repeats the last frame; the decoder would flush
                return []
            packet.pts, packet.dts = number, None
        return [(frame.pts, frame) for frame in self.decoder.decode(packet) if frame.pts is not None]

    def frames(self, packets: Iterable[tuple[int, av.Packet]],
               started: bool = False) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield all frames of numbered packets, as from `decode`. Of a truncated file: up to the first error, with
        those that the decoder holds.

        Args:
            started: False: errors before the first frame are ignored, because a recording may begin in mid-frame.

        Raises:
            FFmpegError: packets cannot be read or decoded.
        """
        ignored = (av.FFmpegError,) if self.is_truncated else ()
        with contextlib.suppress(*ignored):
            for number, packet in packets:
                try:
                    frames = self.decode(packet, number)
                except av.FFmpegError:
                    if started:
                        raise
                    continue
                started = started or bool(frames)
                yield from frames
        with contextlib.suppress(*ignored):
            yield from self.decode(None)

    def rewind(self, timestamp: int | None, position: int | None = None) -> None:
        """Seek to a time (in the stream's units) or a position (in bytes); None: to the beginning."""
        if position is not None:
            self.container.seek(position, stream=self.stream, unsupported_byte_offset=True)
        elif timestamp is not None:
            self.container.seek(timestamp, stream=self.stream)
        else:
            self.close()
            self.container = _open_container(self.path, self.policy)
            self.stream = _select_stream(self.path, self.container)
            self.decoder = self._make_decoder()
        self.decoder.flush_buffers()

    def _make_decoder(self) -> Any:
        context: Any = self.stream.codec_context
        name = context.codec.canonical_name
        if self.policy.codecs is not None and name not in self.policy.codecs:
            raise VideoError(f"{self.path} is encoded as {name}, which is not accepted", "convert it to H.264 in an "
                             "MP4", "codec")
        self.policy.check_size(self.path, context.width, context.height)
        if name in ALPHA_DECODERS and self.stream.metadata.get("alpha_mode") == "1" and \
                ALPHA_DECODERS[name] in av.codecs_available:
            alpha: Any = av.CodecContext.create(ALPHA_DECODERS[name], "r")
            alpha.extradata, context = context.extradata, alpha
        context.thread_count = 1 if self.is_truncated or context.width * context.height < MIN_PIXELS_FOR_THREADS else 0
        context.thread_type = "AUTO"
        return context


def packet_signature(packet: av.Packet, container: str) -> tuple[Any, ...]:
    """Return a key that identifies a packet wherever reading began, on which timestamps in MPEG program streams
    depend."""
    timestamp = None if container == "mpeg" else packet.dts if packet.pts is None else packet.pts
    return packet.size, zlib.crc32(memoryview(packet)), timestamp


def _open_container(path: Path, policy: ReadPolicy) -> av.container.InputContainer:
    options = {} if policy.formats is None else {"format_whitelist": policy.formats, "protocol_whitelist": "file"}
    try:
        if path.is_dir():
            raise VideoError(f"{path} is a folder, not a video file", kind="missing")
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)", "copy or download it again", "empty")
        # Absolute, because FFmpeg takes "a:b.mp4" for a protocol. A title may be in any encoding.
        return av.open(str(path.absolute()), options=options, metadata_errors="replace")
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path} cannot be opened as a video ({reason(error)}): it is another kind of file, or "
                         "truncated before its header", "copy or download it again") from error


def _select_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """Return the first video stream that is not cover art."""
    for stream in container.streams.video:
        if stream.codec_context is None:
            raise VideoError(f"{path} has a video stream without a decoder: the codec is unknown, or the file is "
                             "truncated near its start", "copy or download it again, or encode it as H.264", "codec")
        if not stream.disposition & Disposition.attached_pic:
            return stream
    others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise VideoError(f"{path} holds no video, only {others}", "leave it out", "no video")


def reason(error: Exception) -> str:
    """Return FFmpeg's message without the path, and without its number for "invalid data"."""
    text = str(error).split(":")[0] if isinstance(error, av.FFmpegError) else str(error)
    return text.replace("[Errno 1094995529] ", "")
