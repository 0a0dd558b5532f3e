"""An open video file: its packets, and the decoder of the stream that is shown.

Packets are numbered from 0 as the file has them. A frame is known by the number of its packet, which goes through the
decoder in place of the time stamp: what a decoder reorders, delays or drops is then seen, whatever the container says
about times.
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

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave transparency out
LARGE = 512 * 512  # pixels; below it threads cost more than they bring


@dataclass(frozen=True)
class ReadPolicy:
    """Limits on what is opened, for files that strangers bring.

    Attributes:
        formats: FFmpeg's name of the only demuxer that may read (Pillow's in capitals); others are not tried, nor other
            files or addresses.
        codecs: canonical names of the decoders that may run.
        max_side: pixels.
        max_seconds: the longest duration.
        whole: refuse files whose header promises more than is there.
    """

    formats: str | None = None
    codecs: frozenset[str] | None = None
    max_side: int | None = None
    max_seconds: float | None = None
    whole: bool = False

    @property
    def image_formats(self) -> tuple[str, ...] | None:
        return None if self.formats is None else (self.formats.upper(),)

    def check_size(self, path: Path | str, width: int, height: int) -> None:
        """Raises VideoError."""
        if self.max_side is not None and max(width, height) > self.max_side:
            raise VideoError(f"{path} is too large: {width}x{height} pixels, and a side may have {self.max_side}",
                             "make it smaller", "size")

    def check_length(self, path: Path | str, seconds: float) -> None:
        """Raises VideoError."""
        if self.max_seconds is not None and seconds > self.max_seconds + .5:
            raise VideoError(f"{path} is too long: {seconds:.1f} s, and {self.max_seconds:g} s are taken at most",
                             "cut it", "too long")


ANYTHING = ReadPolicy()


class VideoFile:
    """An open video file and the decoder of the stream that is shown. A context manager. Raises VideoError.

    Args:
        policy: limits on what is opened.
        cut_off: it breaks off somewhere, and what comes before is to be read. One thread decodes it: several would
            find its last frames damaged or whole by their number.
    """

    def __init__(self, path: Path, policy: ReadPolicy = ANYTHING, cut_off: bool = False) -> None:
        self.path, self.policy, self.cut_off = path, policy, cut_off
        self.container = _open_container(path, policy)
        try:
            self.stream = _shown_stream(path, self.container)
            self.decoder = self._make_decoder()
            if self.format not in ("mpegts", "mpeg"):  # these only guess it
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
        """Seconds that the file lasts, by its header; 0 where it does not say."""
        return (self.container.duration or 0) / av.time_base

    @property
    def step(self) -> float:
        """Seconds from frame to frame, by the header."""
        return float(1 / (self.stream.average_rate or self.stream.guessed_rate or 25))

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from where the container stands. FFmpegError where the file breaks off."""
        for packet in self.container.demux(self.stream):
            if packet.size or packet.pts is not None or packet.dts is not None:  # else it is the signal to flush
                yield packet

    def decode(self, packet: av.Packet | None, number: int = 0) -> list[tuple[int, av.VideoFrame]]:
        """Frames with the numbers of their packets, in the order in which they are shown; None: those that are left."""
        if packet is not None:
            if not packet.size:  # Theora and AVI: the same picture again; to the decoder it would be the end
                return []
            packet.pts, packet.dts = number, None
        return [(frame.pts, frame) for frame in self.decoder.decode(packet) if frame.pts is not None]

    def frames(self, packets: Iterable[tuple[int, av.Packet]],
               begun: bool = False) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames of numbered packets to the last, as `decode` gives them. Of a file that is cut off: to the first
        error, with those that the decoder holds.

        Args:
            begun: False: what cannot be decoded before the first frame is no error, as a recording may begin in
                mid-picture.

        Raises:
            FFmpegError: packets cannot be read or decoded.
        """
        ends = (av.FFmpegError,) if self.cut_off else ()
        with contextlib.suppress(*ends):
            for number, packet in packets:
                try:
                    found = self.decode(packet, number)
                except av.FFmpegError:
                    if begun:
                        raise
                    continue
                begun = begun or bool(found)
                yield from found
        with contextlib.suppress(*ends):
            yield from self.decode(None)

    def rewind(self, timestamp: int | None, position: int | None = None) -> None:
        """Go to a time (in the stream's units) or a place (byte) in the file; None: to its beginning."""
        if position is not None:
            self.container.seek(position, stream=self.stream, unsupported_byte_offset=True)
        elif timestamp is not None:
            self.container.seek(timestamp, stream=self.stream)
        else:
            self.close()
            self.container = _open_container(self.path, self.policy)
            self.stream = _shown_stream(self.path, self.container)
            self.decoder = self._make_decoder()
        self.decoder.flush_buffers()

    def _make_decoder(self) -> Any:
        context: Any = self.stream.codec_context
        name = context.codec.canonical_name
        if self.policy.codecs is not None and name not in self.policy.codecs:
            raise VideoError(f"{self.path} is encoded as {name}, which is not taken here", "convert it to an MP4 with "
                             "H.264", "codec")
        self.policy.check_size(self.path, context.width, context.height)
        if name in ALPHA_DECODERS and self.stream.metadata.get("alpha_mode") == "1" and \
                ALPHA_DECODERS[name] in av.codecs_available:
            alpha: Any = av.CodecContext.create(ALPHA_DECODERS[name], "r")
            alpha.extradata, context = context.extradata, alpha
        context.thread_count = 1 if self.cut_off or context.width * context.height < LARGE else 0
        context.thread_type = "AUTO"
        return context


def signature_of(packet: av.Packet, container: str) -> tuple[Any, ...]:
    """What a packet is known by, wherever reading began: in MPEG program streams times depend on that."""
    stamp = None if container == "mpeg" else packet.dts if packet.pts is None else packet.pts
    return packet.size, zlib.crc32(memoryview(packet)), stamp


def _open_container(path: Path, policy: ReadPolicy) -> av.container.InputContainer:
    options = {} if policy.formats is None else {"format_whitelist": policy.formats, "protocol_whitelist": "file"}
    try:
        if path.is_dir():
            raise VideoError(f"{path} is a folder, not a video file", kind="missing")
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)", "copy or download it again", "empty")
        # Absolute: FFmpeg takes "a:b.mp4" for a protocol. A title may be in any encoding.
        return av.open(str(path.absolute()), options=options, metadata_errors="replace")
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path} cannot be opened as a video ({reason(error)}): it is something else, or was cut off "
                         "before its table of contents", "copy or download it again") from error


def _shown_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is no album's cover."""
    for stream in container.streams.video:
        if stream.codec_context is None:
            raise VideoError(f"{path} has a video stream that nothing here can decode: an unknown codec, or a file cut "
                             "off near its beginning", "copy or download it again, or encode it as H.264", "codec")
        if not stream.disposition & Disposition.attached_pic:
            return stream
    others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise VideoError(f"{path} holds no video, only {others}", "leave it out", "no video")


def reason(error: Exception) -> str:
    """FFmpeg's words without the path that they may name, and without its number for "invalid data"."""
    text = str(error).split(":")[0] if isinstance(error, av.FFmpegError) else str(error)
    return text.replace("[Errno 1094995529] ", "")
