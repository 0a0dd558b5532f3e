"""Write H.264 video files with PyAV, chunk by chunk and atomically."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from ...utils.errors import UserError
from ...utils.files import atomic_path

_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}


def write_video(path: Path | str, frames: Iterable[np.ndarray], frame_rate: float, crf: int = 18,
                metadata: Mapping[str, str] | None = None) -> None:
    """Write chunks uint8 (t, H, W, 3), or single frames (H, W, 3), to an H.264 file; see `VideoWriter`."""
    with VideoWriter(path, frame_rate, crf, metadata) as writer:
        for chunk in frames:
            writer.write(chunk)


class VideoWriter:
    """Writes an H.264 file (yuv420p, plays in browsers) chunk by chunk; it gets its name when it is complete.

    A context manager: closes at the end of the block, aborts if the block raises.

    Args:
        path: .mp4, .m4v, .mov or .mkv.
        frame_rate: frames per second.
        crf: 0 (lossless except for the colour conversion) to 51; 18 looks like the original.
        metadata: any keys and values, e.g. title, prompt, to store in the file.
    """

    def __init__(self, path: Path | str, frame_rate: float, crf: int = 18,
                 metadata: Mapping[str, str] | None = None) -> None:
        path = Path(path)
        if path.suffix.lower() not in _CONTAINERS:
            raise UserError(f"cannot write {path}: its name must end in one of {', '.join(_CONTAINERS)}")
        if not frame_rate > 0 or not 0 <= crf <= 51:
            raise UserError(f"cannot write {path} at {frame_rate} fps, crf {crf}: the rate must be above 0, crf from 0 "
                            "to 51")
        self.path = path
        self.frames = 0
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._crf = crf
        self._shape: tuple[int, ...] = ()
        self._container: Any = None
        self._stream: Any = None
        self._reformatter = VideoReformatter()
        self._cleanup = ExitStack()
        temporary = self._cleanup.enter_context(atomic_path(path))
        try:
            # faststart: browsers can play during the download; use_metadata_tags: custom keys in MP4
            self._container = av.open(str(temporary.absolute()), "w", format=_CONTAINERS[path.suffix.lower()],
                                      options={"movflags": "+faststart+use_metadata_tags"})
            self._container.metadata.update(metadata or {})
        except BaseException as error:
            self.abort(error)
            raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abort(error)

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 (t, H, W, 3) or (H, W, 3); H and W even and the same in every call."""
        if self._container is None:
            raise ValueError(f"{self.path} is closed already")
        if frames.ndim == 3:
            frames = frames[None]
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise UserError(f"{self.path}: expected frames uint8 (t, H, W, 3), got {frames.dtype} {frames.shape}")
        if not len(frames):
            return
        try:
            if self._stream is None:
                self._begin(*frames.shape[1:3])
            if frames.shape[1:] != self._shape:
                raise UserError(f"{self.path}: the frames change from {self._shape[0]}x{self._shape[1]} to "
                                f"{frames.shape[1]}x{frames.shape[2]} after {self.frames} frames")
            for picture in frames:
                frame = to_yuv420(picture, self._reformatter, self._stream.codec_context.thread_count)
                frame.pts = self.frames
                self._container.mux(self._stream.encode(frame))
                self.frames += 1
        except BaseException as error:
            self.abort(error)
            raise

    def _begin(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise UserError(f"{self.path}: H.264 needs even sides, not {height}x{width}; crop or resize to "
                            f"{height - height % 2}x{width - width % 2} or {height + height % 2}x{width + width % 2}")
        self._shape = (height, width, 3)
        self._stream = add_h264_stream(self._container, self._rate, height, width, {"crf": str(self._crf)})

    def close(self) -> None:
        """Finish the file and rename it into place; without any frames, raise UserError and leave no file."""
        if self._container is None:
            return
        try:
            if self._stream is None:
                raise UserError(f"{self.path}: a video needs at least one frame, and none was written")
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except BaseException as error:
            self.abort(error)
            raise
        self._container = None
        self._cleanup.close()  # the rename

    def abort(self, error: BaseException | None = None) -> None:
        """Discard the file; an older one of the same name stays. May be called twice."""
        container, self._container = self._container, None
        if container is not None:
            with suppress(av.error.FFmpegError):  # the unfinished file is deleted below
                container.close()
        raised = error or InterruptedError("aborted")
        cleanup, self._cleanup = self._cleanup, ExitStack()
        cleanup.__exit__(type(raised), raised, raised.__traceback__)


def add_h264_stream(container: OutputContainer, rate: Fraction, height: int, width: int, options: dict[str, str],
                    threads: int = 0) -> VideoStream:
    """Add a stream of H.264, 8-bit 4:2:0 and BT.601, to a container.

    Args:
        options: of x264.
        threads: for large pictures; 0: one per core. On small pictures threads cost more than they gain.
    """
    # x264's macroblock tree reads uninitialised memory: with it the same frames sometimes give different bytes.
    stream = container.add_stream("libx264", rate=rate, options={"x264-params": "no-mbtree=1", **options})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    # tagged, because players assume BT.709 for large untagged pictures
    context.colorspace, context.color_range = Colorspace.ITU601, ColorRange.MPEG
    context.thread_count = 1 if height * width < 512 * 512 else threads
    return stream


def to_yuv420(picture: np.ndarray, reformatter: VideoReformatter, threads: int) -> av.VideoFrame:
    """Convert uint8 RGB (H, W, 3) to a frame for `add_h264_stream`."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return reformatter.reformat(frame, format="yuv420p", dst_colorspace=Colorspace.ITU601,
                                dst_color_range=ColorRange.MPEG, threads=threads)


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata written by `VideoWriter`. Raises OSError if there is no readable video."""
    with av.open(str(Path(path).absolute())) as container:
        return {key.lower(): value for key, value in container.metadata.items()}
