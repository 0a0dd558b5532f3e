"""Read video files: uint8 frames (T, H, W, 3) in RGB, by presentation time. (`writing` writes them.)

PyAV decodes, from the nearest keyframe (`decoding`). decord decodes the files that the packet table proves safe for it,
where it is faster: MP4, MOV, MKV and WebM with closed GOPs, in which every packet is a frame with a time of its own and
none is cut by an edit list, and whose pictures need nothing but a BT.601 or BT.709 matrix (`SAFE`): the first, and by
what the headers say (`bitstream`) all others, as x264 and x265 write them unless told to interlace. Times are seconds
from the first frame's presentation. A frame is shown until the next one is: the picture at time t is the latest frame
that has begun by t, so that resampling means the same for constant and for variable frame rates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.errors import UserError
from ..errors import VideoError
from .decoder import FrameDecoder
from .display import FrameConverter
from .file import ANYTHING, ReadPolicy, VideoFile
from .frame_index import index_frames
from .image import AnimatedImage, is_animated, read_image
from .writer import VideoWriter, write_video

__all__ = [
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "count_frames",
    "count_readable",
    "probe",
    "read_clip",
    "read_image",
    "read_stream",
    "write_video",
]

logger = logging.getLogger("odvae")
TOLERANCE = 1e-3  # s; Matroska rounds times to milliseconds, so a frame may begin this much late and still count
AT_ONCE = 2**26  # bytes of full-size frames that a span is transformed in
SAFE = (("mov", "matroska"), ("h264", "hevc", "vp8", "vp9"))  # containers and codecs for decord

Transform = Callable[[np.ndarray], np.ndarray]  # uint8 (t, H, W, 3) -> uint8 (t, h, w, 3)


@dataclass(frozen=True)
class VideoInfo:
    path: Path
    frames: int  # counted, not taken from the header; of a file that is cut off, what can be read
    frame_rate: float  # frames a second, the mean over the file
    height: int  # pixels, upright and square
    width: int
    duration: float  # s, to the end of the last frame
    notes: tuple[str, ...] = ()  # what is done to its first picture, so that it is as a viewer shows it


def probe(path: Path | str) -> VideoInfo:
    """What a video file holds. Reads all of it, decodes one frame; VideoError where it cannot be used."""
    with VideoReader(path) as video:
        return video.info


def read_clip(path: Path | str, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
              transform: Transform | None = None) -> np.ndarray:
    """Frames of one span as uint8 (T, H, W, 3).

    Args:
        start: s; the first frame is the one shown at this time.
        frames: how many; None for all to the end.
        frame_rate: frames a second, at presentation times start + k / frame_rate; None for the frames as stored.
        transform: resizes or crops; it is given a few frames at a time, so that a long span of large frames needs no
            more memory than what it returns.

    Raises:
        VideoError: missing, empty, no video, cut off, undecodable, or shorter than asked.
    """
    with VideoReader(path) as video:
        return video.clip(start, frames, frame_rate, transform)


def read_stream(path: Path | str, frame_rate: float | None = None, chunk: int = 16) -> Iterator[np.ndarray]:
    """A whole file as uint8 chunks (t, H, W, 3), t <= chunk, in constant memory. Raises VideoError as `read_clip`."""
    with VideoReader(path) as video:
        yield from video.iter_chunks(frame_rate=frame_rate, chunk=chunk)


class VideoReader:
    """A video file that is open for reading several spans, best in rising order. A context manager.

    Args:
        readable: of a file that is cut off, how many frames `count_readable` found; only these count.
        policy: limits on what is opened.

    Attributes:
        info: what the file holds.
        times: (N,) s, when each frame begins, rising.
    """

    def __init__(self, path: Path | str, readable: int | None = None, policy: ReadPolicy = ANYTHING) -> None:
        self.path = Path(path)
        self._source = _source(self.path, readable, policy)
        source = self._source
        self.times = source.times
        self.info = VideoInfo(self.path, len(source.times), len(source.times) / source.duration, source.height,
                              source.width, source.duration, source.notes)
        self._decord: Any = None
        self._picture: tuple[int, np.ndarray] | None = None  # the last one and its number

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done to its pictures so that they are as a viewer shows them: the first, and those read so far."""
        return self._source.notes

    def close(self) -> None:
        self._decord = self._picture = None
        self._source.close()

    def clip(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
             transform: Transform | None = None) -> np.ndarray:
        """One span as uint8 (T, H, W, 3), as `read_clip`."""
        chunk = max(1, AT_ONCE // (self.info.height * self.info.width * 3))
        chunks = self.iter_chunks(start, frames, frame_rate, chunk)
        return np.concatenate([part if transform is None else transform(part) for part in chunks])

    def iter_chunks(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
               chunk: int = 16) -> Iterator[np.ndarray]:
        """The same span in chunks (t, H, W, 3) of at most `chunk` frames."""
        if chunk < 1:
            raise UserError(f"chunk={chunk} frames at once must be at least 1")
        wanted = self._wanted(start, frames, frame_rate)
        ranks = np.searchsorted(self.times, wanted + TOLERANCE, "right") - 1
        for cut in range(0, len(ranks), chunk):
            part = ranks[cut:cut + chunk]
            found = self._by_decord(part)
            yield np.stack([self._by_number(int(rank)) for rank in part]) if found is None else found

    def _by_number(self, rank: int) -> np.ndarray:
        if self._picture is None or self._picture[0] != rank:
            self._picture = rank, self._source.picture(rank)
        return self._picture[1]

    def _by_decord(self, ranks: np.ndarray) -> np.ndarray | None:
        """The frames of these numbers; None where decord must not or cannot read this file."""
        if not self._source.suits_decord:
            return None
        reader, error = _decord()
        try:
            if self._decord is None:
                # Threads cost more than they bring on small pictures.
                threads = 1 if self.info.height * self.info.width < 512 * 512 else 0
                self._decord = reader(str(self.path.absolute()), num_threads=threads)
            if len(self._decord) == len(self.times):  # else its indices do not mean ours
                found: np.ndarray = self._decord.get_batch(ranks).asnumpy()
                if found.shape[1:3] == (self.info.height, self.info.width):
                    return found
        except (RuntimeError, AssertionError, UnicodeEncodeError, error):  # the last but one: a name not in UTF-8
            pass  # PyAV has the last word and the better message. (decord2 3.4 fails on a few widths: 32, 48, 96.)
        self._decord, self._source.suits_decord = None, False
        return None

    def _wanted(self, start: float, frames: int | None, frame_rate: float | None) -> np.ndarray:
        """The times (T,) of a span, all of them inside the video."""
        if not 0 <= start < math.inf or (frames is not None and frames < 1) or (
                frame_rate is not None and not 0 < frame_rate < math.inf):
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


class _Decoded:
    """The frames of a video stream, as `AnimatedImage` gives those of a picture that moves."""

    def __init__(self, path: Path, readable: int | None, policy: ReadPolicy) -> None:
        self._file = VideoFile(path, policy, cut_off=readable is not None)
        try:
            index = index_frames(self._file, readable)
            self._decoder = FrameDecoder(self._file, index)
            self._convert = FrameConverter(index.head[0], self._file.stream.sample_aspect_ratio)
        except BaseException:
            self._file.close()
            raise
        self.times, self.duration = index.times, index.duration
        self.height, self.width = self._convert.height, self._convert.width
        containers, codecs = SAFE
        self.suits_decord = (index.simple and index.uniform and self._convert.plain and readable is None
                             and self._file.format in containers and self._file.codec in codecs)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._convert.notes

    def picture(self, rank: int) -> np.ndarray:
        return self._convert(self._decoder.frame(rank))

    def close(self) -> None:
        self._file.close()


class _Animated(AnimatedImage):
    suits_decord = False


def _source(path: Path, readable: int | None, policy: ReadPolicy) -> _Decoded | _Animated:
    return _Animated(path, policy) if is_animated(path) else _Decoded(path, readable, policy)


def count_readable(path: Path | str) -> int:
    """How many frames reading a file that is cut off gives: up to the last that can be decoded. Decodes them."""
    with VideoFile(Path(path), cut_off=True) as file:
        ranks = {int(packet): rank for rank, packet in enumerate(index_frames(file).packets)}
        file.rewind(None)
        found = [ranks[number] for number, _ in file.frames(enumerate(file.packets())) if number in ranks]
    return max(found) + 1
