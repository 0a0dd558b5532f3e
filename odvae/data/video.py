"""Read video files: uint8 frames (T, H, W, C) in RGB, by presentation time. (`writing` writes them.)

decord decodes; PyAV counts the frames, and decodes what decord cannot. Times are seconds from the first
frame's presentation. A frame is shown until the next one is: the picture at time t is the latest frame that has begun
by t, so that resampling means the same for constant and for variable frame rates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from ..runtime.errors import UserError
from .writing import VideoWriter, write_video

__all__ = ["Video", "VideoError", "VideoInfo", "VideoWriter", "count_frames", "count_readable", "probe", "read_clip",
           "read_image", "read_stream", "write_video"]

TOLERANCE = 1e-3  # s; Matroska rounds times to milliseconds, so a frame may begin this much late and still count


class VideoError(UserError):
    """A video file that cannot be used; names the file, what was found and what to do.

    Attributes:
        kind: one of "missing", "empty", "no video", "codec", "truncated", "corrupt", "too short", "caption", "remote",
            "hang", "crash", "changed", "size", "too long", "setup", "not finite".
        reason, advice: the two halves of the message.
    """

    def __init__(self, reason: str, advice: str = "", kind: str = "corrupt") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason, self.advice, self.kind = reason, advice, kind


@dataclass(frozen=True)
class VideoInfo:
    path: Path
    frames: int  # counted, not taken from the header; of a file that is cut off, what can be read
    frame_rate: float  # frames a second, the mean over the file
    height: int  # pixels, upright
    width: int
    duration: float  # s, to the end of the last frame


def probe(path: Path | str) -> VideoInfo:
    """What a video file holds. Reads all of it, decodes one frame; VideoError where it cannot be used."""
    return _index(Path(path))[0]


def read_clip(path: Path | str, start: float = 0.0, frames: int | None = None,
              frame_rate: float | None = None) -> np.ndarray:
    """Frames of one span as uint8 (T, H, W, 3).

    Args:
        start: s; the first frame is the one shown at this time.
        frames: how many; None for all to the end.
        frame_rate: frames a second, at presentation times start + k / frame_rate; None for the frames as stored.

    Raises:
        VideoError: missing, empty, no video, cut off, undecodable, or shorter than asked.
    """
    with Video(path) as video:
        return video.clip(start, frames, frame_rate)


def read_stream(path: Path | str, frame_rate: float | None = None, piece: int = 16) -> Iterator[np.ndarray]:
    """A whole file as uint8 pieces (t, H, W, 3), t <= piece, in constant memory. Raises VideoError as `read_clip`."""
    with Video(path) as video:
        yield from video.pieces(frame_rate=frame_rate, piece=piece)


def read_image(path: Path | str) -> np.ndarray:
    """A photo, upright, as a video of one frame: uint8 (1, H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None].copy()
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is no image that can be read ({error})", "save it again as PNG or JPEG") from error


class Video:
    """A video file that is open for reading several spans, best in rising order. A context manager.

    Args:
        readable: of a file that is cut off, how many frames `count_readable` found; only these count.
    """

    def __init__(self, path: Path | str, readable: int | None = None) -> None:
        self.path = Path(path)
        self.info, self.times = _index(self.path, readable)  # times: s, when each frame begins, sorted
        self._decord: Any = None
        self._decord_fails = False
        self._shown: _Shown | None = None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._decord = None
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def clip(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None) -> np.ndarray:
        """One span as uint8 (T, H, W, 3), as `read_clip`."""
        return np.concatenate(list(self.pieces(start, frames, frame_rate, piece=64)))

    def pieces(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
               piece: int = 16) -> Iterator[np.ndarray]:
        """The same span in pieces (t, H, W, 3) of at most `piece` frames."""
        if piece < 1:
            raise UserError(f"piece={piece} frames at once must be at least 1")
        wanted = self._wanted(start, frames, frame_rate)
        for cut in range(0, len(wanted), piece):
            times = wanted[cut:cut + piece]
            found = self._by_decord(times)
            yield self._by_av(times) if found is None else found

    def _wanted(self, start: float, frames: int | None, frame_rate: float | None) -> np.ndarray:
        """The times (T,) of a span, all of them inside the video."""
        if start < 0 or (frames is not None and frames < 1) or (frame_rate is not None and not frame_rate > 0):
            raise UserError(f"cannot read {frames} frames from {start} s at {frame_rate} a second: the start must be "
                            "at least 0, the frames at least 1, the rate above 0")
        first = int(np.searchsorted(self.times, start + TOLERANCE, "right")) - 1
        if start > self.info.duration - TOLERANCE:
            available = 0
        elif frame_rate is None:
            available = len(self.times) - first
        else:
            available = count_frames(self.info.duration - start, frame_rate)
        if available < (frames or 1):
            rate = "as stored" if frame_rate is None else f"at {frame_rate:g} a second"
            raise VideoError(f"{self.path} is too short: it lasts {self.info.duration:.3f} s, which from {start:g} s "
                             f"on gives {available} frames {rate}, and {frames or 1} are needed",
                             "ask for fewer, or leave this file out", "too short")
        count = frames or available
        return self.times[first:first + count] if frame_rate is None else start + np.arange(count) / frame_rate

    def _by_decord(self, times: np.ndarray) -> np.ndarray | None:
        """The frames shown at `times`; None from the first time on that decord fails on this file."""
        if self._decord_fails:
            return None
        reader, error = _decord()
        try:
            if self._decord is None:
                # Threads cost more than they bring on small pictures.
                threads = 1 if self.info.height * self.info.width < 512 * 512 else 0
                self._decord = reader(str(self.path.absolute()), num_threads=threads)
            indices = np.searchsorted(self.times, times + TOLERANCE, "right") - 1
            if len(self._decord) == len(self.times):  # else its indices do not mean ours
                found: np.ndarray = self._decord.get_batch(indices).asnumpy()
                if found.shape[1:3] == (self.info.height, self.info.width):
                    return found
        except (RuntimeError, AssertionError, UnicodeEncodeError, error):  # the last but one: a name that is no UTF-8
            pass  # PyAV has the last word and the better message. (decord2 3.4 fails on a few widths: 32, 48, 96.)
        self._decord, self._decord_fails = None, True
        return None

    def _by_av(self, times: np.ndarray) -> np.ndarray:
        if self._shown is None or self._shown.time > times[0] + TOLERANCE:
            if self._shown is not None:
                self._shown.close()
            self._shown = _Shown(self.path, self.info)
        expected = self.times[np.searchsorted(self.times, times + TOLERANCE, "right") - 1]
        return np.stack([self._shown.at(float(t), float(e)) for t, e in zip(times, expected, strict=True)])


def count_frames(duration: float, frame_rate: float) -> int:
    """How many of the times 0, 1/frame_rate, 2/frame_rate ... lie inside `duration` seconds."""
    return max(0, math.ceil((duration - TOLERANCE) * frame_rate))


@cache
def _decord() -> tuple[Any, type[Exception]]:
    """decord's reader and its error (from decord2, the living fork under the same module name)."""
    import decord
    from decord.base import DECORDError

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader, DECORDError


def _open(path: Path) -> tuple[av.container.InputContainer, av.VideoStream]:
    try:
        if path.is_dir():
            raise VideoError(f"{path} is a folder, not a video file", kind="missing")
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)", "copy or download it again", "empty")
        # Absolute: FFmpeg takes "a:b.mp4" for a protocol. A title may be in any encoding.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except av.error.FFmpegError as error:
        raise VideoError(f"{path} cannot be opened as a video ({_reason(error)}): it is something else, or was cut off "
                         "before its table of contents", "copy or download it again") from error
    for stream in container.streams.video:
        if stream.codec_context is None:
            container.close()
            raise VideoError(f"{path} has a video stream that nothing here can decode: an unknown codec, or a file cut "
                             "off near its beginning", "copy or download it again, or encode it as H.264", "codec")
        if not stream.disposition & av.stream.Disposition.attached_pic:  # an album's cover is no video
            stream.codec_context.thread_count = 1
            return container, stream
    others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    container.close()
    raise VideoError(f"{path} holds no video, only {others}", "leave it out", "no video")


def _reason(error: Exception) -> str:
    text = str(error).split(":")[0] if isinstance(error, av.error.FFmpegError) else str(error)
    return text.replace("[Errno 1094995529] ", "")  # FFmpeg's number for "invalid data"


def _is_void(packet: av.Packet) -> bool:
    """Theora stores "the same picture again" as a packet of no bytes, which libavcodec refuses."""
    return packet.size == 0 and packet.pts is not None


def count_readable(path: Path | str) -> int:
    """How many frames of a file that is cut off can be decoded from its beginning on. Decodes them."""
    container, stream = _open(Path(path))
    count = 0
    with container, contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux(stream):
            count += len(() if _is_void(packet) else packet.decode())
    return count


def _index(path: Path, readable: int | None = None) -> tuple[VideoInfo, np.ndarray]:
    """Count the frames and note when each begins; decode one for the upright size."""
    container, stream = _open(path)
    with container:
        begins: list[float] = []
        frame, last, end, damaged = None, -math.inf, 0.0, False
        step = float(1 / (stream.average_rate or 25))
        num, den = (stream.time_base or Fraction(1)).as_integer_ratio()  # s a tick; Fraction itself is slow in a loop
        try:
            for packet in container.demux(stream):
                if frame is None and not _is_void(packet):
                    frame = _first_frame(packet)
                if not packet.size or packet.is_discard:
                    continue
                ticks = packet.dts if packet.pts is None else packet.pts
                time = len(begins) * step if ticks is None else ticks * num / den
                begins.append(time)
                damaged = packet.is_corrupt
                if time > last:
                    last, end = time, time + ((packet.duration or 0) * num / den or step)
        except av.error.FFmpegError as error:
            if readable is None:
                raise VideoError(f"{path} cannot be read to its end ({_reason(error)}, after {len(begins)} frames)",
                                 "copy or download it again", "truncated") from error
    if damaged and readable is None:
        raise VideoError(f"{path} is cut off: it breaks off in the middle of frame {len(begins)}, after about "
                         f"{last - min(begins):.2f} s", "copy or download it again", "truncated")
    if frame is None or not begins:
        raise VideoError(f"{path} holds no frame that can be decoded", "leave it out or encode it again", "codec")
    times = np.sort(np.asarray(begins))
    if readable is not None and readable < len(times):
        times, end = times[:readable], float(times[readable])
    upright = (frame.height, frame.width) if frame.rotation % 180 == 0 else (frame.width, frame.height)
    duration = end - float(times[0])
    return VideoInfo(path, len(times), len(times) / duration, *upright, duration), times - times[0]


def _first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.FFmpegError:
        return None  # a recording may begin in mid-picture; that there is no frame at all is told by the caller


class _Shown:
    """What a file shows at times that never go back, decoded by PyAV from the beginning."""

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self._path, self._info = path, info
        self._frames = self._decode()
        self._ahead = next(self._frames, None)
        self._origin = 0.0 if self._ahead is None else self._ahead[0]
        self._reformatter = VideoReformatter()
        self.time = 0.0  # s, when the current frame begins
        self._now: av.VideoFrame | None = None
        self._picture: np.ndarray | None = None

    def close(self) -> None:
        self._frames.close()

    def at(self, time: float, expected: float) -> np.ndarray:
        """The picture (H, W, 3) shown at `time`, which by the index begins at `expected`."""
        while self._ahead is not None and self._ahead[0] - self._origin <= time + TOLERANCE:
            self.time, self._now, self._picture = self._ahead[0] - self._origin, self._ahead[1], None
            self._ahead = next(self._frames, None)
        if self._now is None or (self._ahead is None and self.time < expected - TOLERANCE):
            raise VideoError(f"{self._path} cannot be decoded beyond {self.time:.2f} s of {self._info.duration:.2f} s",
                             "encode it again, or leave it out")
        if self._picture is None:
            turns = round(self._now.rotation / 90)
            # A stream that changes its size midway is scaled to how it began, as decord and FFmpeg's players do.
            height, width = (self._info.height, self._info.width)[:: -1 if turns % 2 else 1]
            rgb = self._reformatter.reformat(self._now, width, height, "rgb24", threads=1).to_ndarray()
            self._picture = np.ascontiguousarray(np.rot90(rgb, turns))
        return self._picture

    def _decode(self) -> Generator[tuple[float, av.VideoFrame], None, None]:
        container, stream = _open(self._path)
        with container:
            count = 0
            try:
                for packet in container.demux(stream):
                    for frame in () if _is_void(packet) else packet.decode():
                        yield count / self._info.frame_rate if frame.time is None else frame.time, frame
                        count += 1
            except av.error.FFmpegError as error:
                if count >= self._info.frames:  # of a file that is cut off all that can be read was given
                    return
                raise VideoError(f"{self._path} cannot be decoded beyond frame {count} of {self._info.frames} "
                                 f"({_reason(error)})", "encode it again, or leave it out") from error
