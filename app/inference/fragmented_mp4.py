"""Growing videos as fragmented MP4, MP4 files with their settings in the metadata, and still pictures."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from odvae.data.video.writer import add_h264_stream, to_yuv420
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_path

MIN_DISPLAY_SIDE = 256  # pixels of the short side, below which a video is enlarged
CHUNKS_FOLDER = "chunks"  # in the folder of the video
HEADER = (b"ftyp", b"moov")  # boxes of the first chunk only
# One fragment per chunk, with the timestamps of its packets: neither shifted to 0 nor followed by an index.
FRAGMENT = {"movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
            "avoid_negative_ts": "disabled"}


class FragmentedMp4Writer:
    """Writes an H.264 video as immutable chunks, FOLDER/chunks/000000.mp4 and so on.

    The first n chunks, concatenated, are a fragmented MP4, which a browser's Media Source Extensions accept chunk by
    chunk. So the cost of a chunk does not depend on the length of the video. One encoder writes the whole video; it
    delays no frame (no B-frames, no look-ahead), so a chunk has all packets of its frames.

    The same frames give the same bytes: a job that restarts after a kill writes the same files, and a client that has
    some of them continues with the next one.

    Small pictures are enlarged by an integer: H.264 stores color at half the resolution, which blurs the edges of small
    pictures, and most players show a small video small.
    """

    def __init__(self, folder: Path, frame_rate: float) -> None:
        self.folder = folder
        self.frames = 0
        self.chunks = 0  # chunks written so far
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._shape: tuple[int, ...] = ()
        self._scale = 1
        self._encoder: VideoStream | None = None
        self._reformatter = VideoReformatter()
        # The encoder needs a container; nothing is ever written to this one.
        self._sink = cast(OutputContainer, av.open(io.BytesIO(), "w", format="mp4"))

    def append(self, frames: np.ndarray) -> int:
        """Write one chunk, uint8 (t, H, W, 3) with t >= 1. Return the number of frames so far.

        Raises:
            UserError: large pictures with odd sides, or of another size than before.
            OSError: the disk is full. The earlier chunks are valid; continue with a new writer.
        """
        if self._encoder is None:
            self._encoder = self._start(height=frames.shape[1], width=frames.shape[2])
        if frames.shape[1:] != self._shape:
            raise UserError(f"The frames change from {self._shape[0]}x{self._shape[1]} to {frames.shape[1]}x"
                            f"{frames.shape[2]} after frame {self.frames}; a video has one size.")
        packets: list[av.Packet] = []
        for k, frame in enumerate(frames):
            packets += self._encoder.encode(self._picture(frame, self.frames + k))
        if len(packets) != len(frames):
            raise RuntimeError(f"The H.264 encoder returned {len(packets)} packets for {len(frames)} frames.")
        self._publish(self._mux(packets))
        self.chunks += 1
        self.frames += len(frames)
        return self.frames

    def finish(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Concatenate the chunks into one MP4 without encoding them again, with `settings` as JSON in its comment.

        Needs constant memory. The chunks stay; the caller removes them. Raises UserError if there is no frame.
        """
        self.close()
        with atomic_path(path) as temporary:
            _join(_paths(self.folder)[: self.chunks], str(temporary), settings, "use_metadata_tags+faststart")

    def close(self) -> None:
        """Close the encoder; the chunks stay. May be called twice."""
        if self._encoder is not None:
            self._encoder.encode(None)
            self._encoder = None
        self._sink.close()

    def __enter__(self) -> FragmentedMp4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, height: int, width: int) -> VideoStream:
        self._shape, self._scale = (height, width, 3), display_scale(height, width)
        height, width = height * self._scale, width * self._scale
        if height % 2 or width % 2:
            raise UserError(f"H.264 needs even sides, but the frames are {height}x{width}. Choose even sides.")
        # Zero latency: a frame's packet is returned at once. A key frame every 2 s makes seeking fast. The number of
        # threads is fixed: each writes a slice, so it changes the bytes.
        options = {"crf": "16", "tune": "zerolatency", "bf": "0"}
        stream = add_h264_stream(self._sink, self._rate, height, width, options, threads=4)
        stream.gop_size = max(1, math.floor(2 * self._rate))
        stream.time_base = 1 / self._rate
        self._sink.start_encoding()  # writes the stream header, which the chunks need
        return stream

    def _picture(self, frame: np.ndarray, time: int) -> av.VideoFrame:
        frame = frame.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        picture = to_yuv420(frame, self._reformatter, threads=1)
        picture.pts, picture.time_base = time, 1 / self._rate
        return picture

    def _mux(self, packets: list[av.Packet]) -> bytes:
        """Return the next chunk: the boxes moof and mdat, and before the first chunk the header."""
        buffer = io.BytesIO()
        options = {**FRAGMENT, "fragment_index": str(self.chunks + 1)}
        with cast(OutputContainer, av.open(buffer, "w", format="mp4", options=options)) as out:
            stream = out.add_stream_from_template(cast(VideoStream, self._encoder))
            stream.time_base = 1 / self._rate
            for packet in packets:
                packet.duration, packet.stream = 1, stream
                out.mux(packet)
        return b"".join(box for kind, box in boxes(buffer.getvalue()) if self.chunks == 0 or kind not in HEADER)

    def _publish(self, chunk: bytes) -> None:
        path = chunk_path(self.folder, self.chunks)
        if path.is_file():
            if path.read_bytes() == chunk:
                return
            # A restarted job has other frames: the later chunks do not fit any more.
            for later in reversed(_paths(self.folder)[self.chunks :]):
                later.unlink()
        with atomic_path(path) as temporary:
            temporary.write_bytes(chunk)


def chunk_path(folder: Path, number: int) -> Path:
    """Return the path of a chunk, counted from 0."""
    return folder / CHUNKS_FOLDER / f"{number:06d}.mp4"


def concat_fragments(folder: Path) -> Iterator[bytes]:
    """Return the video so far as a plain MP4, for browsers without Media Source Extensions. Copies all chunks to a
    temporary file, in constant memory. Raises UserError if there is no chunk yet."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the iterator closes it)
    _join(_paths(folder), file, {}, "")
    file.seek(0)

    def read() -> Iterator[bytes]:
        with file:
            while block := file.read(2**16):
                yield block

    return read()


def _paths(folder: Path) -> list[Path]:
    """Return the chunks in order, up to the first missing one."""
    paths: list[Path] = []
    while (path := chunk_path(folder, len(paths))).is_file():
        paths.append(path)
    return paths


class _ConcatenatedFile:
    """Several files as one forward-only stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._left = list(reversed(paths))
        self._file: BinaryIO = io.BytesIO()

    def read(self, size: int) -> bytes:
        while not (block := self._file.read(size)) and self._left:
            self._file.close()
            self._file = self._left.pop().open("rb")
        return block


def _join(chunks: list[Path], target: str | BinaryIO, settings: Mapping[str, Any], flags: str) -> None:
    if not chunks:
        raise UserError("The video has no frame yet.")
    with (
        cast(InputContainer, av.open(_ConcatenatedFile(chunks), format="mp4")) as source,
        cast(OutputContainer, av.open(target, "w", format="mp4", options={"movflags": flags} if flags else {})) as out,
    ):
        if settings:
            out.metadata["comment"] = json.dumps(settings, ensure_ascii=False)
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:  # the demuxer ends with an empty packet
                packet.stream = stream
                out.mux(packet)


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and the bytes of each top-level box of an MP4 (boxes under 4 GiB)."""
    offset = 0
    while offset < len(content):
        size = int.from_bytes(content[offset : offset + 4], "big")
        if size < 8:
            raise ValueError(f"not an MP4: a box of {size} bytes at offset {offset}")
        yield content[offset + 4 : offset + 8], content[offset : offset + size]
        offset += size


def display_scale(height: int, width: int) -> int:
    """Return the integer by which pictures are enlarged: 1, or an even one, as H.264 needs even sides."""
    short = min(height, width)
    return 1 if short >= MIN_DISPLAY_SIDE else 2 * math.ceil(MIN_DISPLAY_SIDE / (2 * short))


def read_settings(path: Path, name: str = "") -> dict[str, Any]:
    """Return the settings in the comment of an MP4 of this app or of `lvdm generate`, not validated.

    Safe for untrusted files: they are read as MP4 only.

    Args:
        name: the user's name for the file, if it is another one.

    Raises:
        UserError: the file has no settings.
    """
    name = name or path.name
    try:
        # An open file, so that the demuxer cannot derive the paths of other files.
        with path.open("rb") as file, cast(InputContainer, av.open(file, format="mp4",
                                                                   metadata_errors="replace")) as container:
            metadata = {key.lower(): value for key, value in container.metadata.items()}
        settings = json.loads(metadata.get("comment", ""))
    except (av.FFmpegError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name} has no settings: it is not a video of this app, or another program has rewritten "
                        "it. Choose the original file.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{name} has no settings of this app. Choose a video that it generated.")
    return settings


def write_picture(path: Path, frame: np.ndarray) -> None:
    """Write a picture, uint8 (H, W, 3), as WebP, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="WEBP", quality=90)
