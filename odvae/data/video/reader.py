"""Read video files: uint8 frames (T, H, W, 3) in RGB, by presentation time. (`writer` writes them.)

PyAV decodes, from the nearest keyframe (`decoder`). decord, which is faster, decodes the files that the packet table
proves safe for it (`DECORD_SAFE`): MP4, MOV, MKV and WebM with closed GOPs, in which every packet is a frame with its
own timestamp and none is cut by an edit list, and whose frames need only a BT.601 or BT.709 matrix: the first, and by
the headers (`bitstream`) all others, as x264 and x265 write them unless they interlace. Times are seconds from the
first frame's presentation. A frame is shown until the next one: the picture at time t is the latest frame that starts
by t, so that resampling means the same for constant and for variable frame rates.
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
from .file import MIN_PIXELS_FOR_THREADS, NO_LIMITS, ReadPolicy, VideoFile
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
TOLERANCE = 1e-3  # s that a frame may start late, because Matroska rounds timestamps to milliseconds
TRANSFORM_BYTES = 2**26  # of full-size frames that are decoded and transformed at a time
DECORD_SAFE = (("mov", "matroska"), ("h264", "hevc", "vp8", "vp9"))  # containers and codecs for decord

Transform = Callable[[np.ndarray], np.ndarray]  # uint8 (t, H, W, 3) -> uint8 (t, h, w, 3)


@dataclass(frozen=True)
class VideoInfo:
    path: Path
    frames: int  # counted, not taken from the header; of a truncated file, the readable ones
    frame_rate: float  # frames per second, the mean over the file
    height: int  # pixels, upright and square
    width: int
    duration: float  # s, to the end of the last frame
    notes: tuple[str, ...] = ()  # conversions applied to the first frame, such as "deinterlaced"


def probe(path: Path | str) -> VideoInfo:
    """Probe a video file. Reads all of it and decodes one frame; raises VideoError if it cannot be used."""
    with VideoReader(path) as video:
        return video.info


def read_clip(path: Path | str, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
              transform: Transform | None = None) -> np.ndarray:
    """Read the frames of a time span as uint8 (T, H, W, 3).

    Args:
        start: s; the first frame is the one shown at this time.
        frames: number of frames; None for all to the end.
        frame_rate: frames per second, at presentation times start + k / frame_rate; None for the frames as stored.
        transform: resizes or crops; called with a few frames at a time, so that a long span of large frames needs
            memory only for its result.

    Raises:
        VideoError: missing, empty, no video, truncated, undecodable, or shorter than requested.
    """
    with VideoReader(path) as video:
        return video.clip(start, frames, frame_rate, transform)


def read_stream(path: Path | str, frame_rate: float | None = None, chunk: int = 16) -> Iterator[np.ndarray]:
    """Yield a whole file as uint8 chunks (t, H, W, 3), t <= chunk, in constant memory. Raises VideoError as
    `read_clip`."""
    with VideoReader(path) as video:
        yield from video.iter_chunks(frame_rate=frame_rate, chunk=chunk)


class VideoReader:
    """A video file that is open for reading several spans, fastest in rising order. A context manager.

    Args:
        readable: of a truncated file, the number of frames from `count_readable`; only these are read.
        policy: limits for opening it.

    Attributes:
        info: the file's properties.
        times: (N,) s, start of each frame, rising.
    """

    def __init__(self, path: Path | str, readable: int | None = None, policy: ReadPolicy = NO_LIMITS) -> None:
        self.path = Path(path)
        self._source = _source(self.path, readable, policy)
        source = self._source
        self.times = source.times
        self.info = VideoInfo(self.path, len(source.times), len(source.times) / source.duration, source.height,
                              source.width, source.duration, source.notes)
        self._decord: Any = None
        self._last_frame: tuple[int, np.ndarray] | None = None  # with its number

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """Conversions applied to the frames read so far, the first included, such as "deinterlaced"."""
        return self._source.notes

    def close(self) -> None:
        self._decord = self._last_frame = None
        self._source.close()

    def clip(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
             transform: Transform | None = None) -> np.ndarray:
        """Read a span as uint8 (T, H, W, 3), as `read_clip`."""
        chunk = max(1, TRANSFORM_BYTES // (self.info.height * self.info.width * 3))
        chunks = self.iter_chunks(start, frames, frame_rate, chunk)
        return np.concatenate([part if transform is None else transform(part) for part in chunks])

    def iter_chunks(self, start: float = 0.0, frames: int | None = None, frame_rate: float | None = None,
                    chunk: int = 16) -> Iterator[np.ndarray]:
        """Yield the same span in chunks (t, H, W, 3) of at most `chunk` frames."""
        if chunk < 1:
            raise UserError(f"chunk is {chunk} frames, and must be at least 1")
        times = self._span_times(start, frames, frame_rate)
        numbers = np.searchsorted(self.times, times + TOLERANCE, "right") - 1
        for cut in range(0, len(numbers), chunk):
            part = numbers[cut:cut + chunk]
            found = self._read_by_decord(part)
            yield np.stack([self._read_by_pyav(int(number)) for number in part]) if found is None else found

    def _read_by_pyav(self, number: int) -> np.ndarray:
        if self._last_frame is None or self._last_frame[0] != number:
            self._last_frame = number, self._source.picture(number)
        return self._last_frame[1]

    def _read_by_decord(self, numbers: np.ndarray) -> np.ndarray | None:
        """Read frames with decord; None if it must not or cannot read this file."""
        if not self._source.suits_decord:
            return None
        reader, error = _decord()
        try:
            if self._decord is None:
                threads = 1 if self.info.height * self.info.width < MIN_PIXELS_FOR_THREADS else 0
                self._decord = reader(str(self.path.absolute()), num_threads=threads)
            if len(self._decord) == len(self.times):  # else its frame numbers differ from ours
                frames: np.ndarray = self._decord.get_batch(numbers).asnumpy()
                if frames.shape[1:3] == (self.info.height, self.info.width):
                    return frames
        except (RuntimeError, AssertionError, UnicodeEncodeError, error):  # UnicodeEncodeError: a name not in UTF-8
            pass  # PyAV tries again, with better messages. (decord2 3.4 fails on a few widths: 32, 48, 96.)
        self._decord, self._source.suits_decord = None, False
        return None

    def _span_times(self, start: float, frames: int | None, frame_rate: float | None) -> np.ndarray:
        """Return the times (T,) of a span, all of them within the video."""
        if not 0 <= start < math.inf or (frames is not None and frames < 1) or (
                frame_rate is not None and not 0 < frame_rate < math.inf):
            raise UserError(f"cannot read {frames} frames from {start} s at {frame_rate} fps: the start must be at "
                            "least 0, the frames at least 1, the rate above 0")
        first = int(np.searchsorted(self.times, start + TOLERANCE, "right")) - 1
        if start > self.info.duration - TOLERANCE:
            available = 0
        elif frame_rate is None:
            available = len(self.times) - first
        else:
            available = count_frames(self.info.duration - start, frame_rate)
        if available < (frames or 1):
            rate = "as stored" if frame_rate is None else f"at {frame_rate:g} fps"
            raise VideoError(f"{self.path} is too short: it lasts {self.info.duration:.3f} s, which from {start:g} s "
                             f"on gives {available} frames {rate}, and {frames or 1} are needed",
                             "request fewer, or leave this file out", "too short")
        count = frames or available
        return self.times[first:first + count] if frame_rate is None else start + np.arange(count) / frame_rate


def count_frames(duration: float, frame_rate: float) -> int:
    """Return how many of the times 0, 1/frame_rate, 2/frame_rate ... lie within `duration` seconds."""
    return max(0, math.ceil((duration - TOLERANCE) * frame_rate))


@cache
def _decord() -> tuple[Any, type[Exception]]:
    """Return decord's reader and its error (from decord2, the maintained fork with the same module name)."""
    import decord
    from decord.base import DECORDError

    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader, DECORDError


class _VideoSource:
    """The frames of a video stream, with the interface of `AnimatedImage`."""

    def __init__(self, path: Path, readable: int | None, policy: ReadPolicy) -> None:
        self._file = VideoFile(path, policy, is_truncated=readable is not None)
        try:
            index = index_frames(self._file, readable)
            self._decoder = FrameDecoder(self._file, index)
            self._convert = FrameConverter(index.head[0], self._file.stream.sample_aspect_ratio)
        except BaseException:
            self._file.close()
            raise
        self.times, self.duration = index.times, index.duration
        self.height, self.width = self._convert.height, self._convert.width
        containers, codecs = DECORD_SAFE
        self.suits_decord = (index.is_simple and index.has_uniform_format and self._convert.plain and readable is None
                             and self._file.format in containers and self._file.codec in codecs)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._convert.notes

    def picture(self, number: int) -> np.ndarray:
        return self._convert(self._decoder.frame(number))

    def close(self) -> None:
        self._file.close()


class _AnimatedSource(AnimatedImage):
    suits_decord = False


def _source(path: Path, readable: int | None, policy: ReadPolicy) -> _VideoSource | _AnimatedSource:
    return _AnimatedSource(path, policy) if is_animated(path) else _VideoSource(path, readable, policy)


def count_readable(path: Path | str) -> int:
    """Count the readable frames of a truncated file, up to the last decodable one, by decoding them."""
    with VideoFile(Path(path), is_truncated=True) as file:
        frame_of = {int(packet): frame for frame, packet in enumerate(index_frames(file).packets)}
        file.rewind(None)
        decoded = [frame_of[packet] for packet, _ in file.frames(enumerate(file.packets())) if packet in frame_of]
    return max(decoded) + 1
