"""Videos that are watched while they are made, MP4 files with their settings inside, and still pictures."""

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

SHOWN = 256  # the short side, in pixels, that a video should have at least to be looked at
CHUNKS = "chunks"  # the folder of the chunks, in the video's folder
HEADER = (b"ftyp", b"moov")  # the boxes that only the first chunk begins with
# A fragment for each chunk, at the times of its packets: neither shifted to 0 nor followed by an index.
FRAGMENT = {"movflags": "frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer",
            "avoid_negative_ts": "disabled"}


class FragmentedMp4Writer:
    """An H.264 video of which every chunk is one file, FOLDER/chunks/000000.mp4 and so on, that is never changed again.

    The first n files, joined, are a fragmented MP4 at every time: what a browser's Media Source Extensions take one
    after another. So a chunk costs the same however long the video has become. One encoder lives as long as the video;
    it holds no frame back (no B-frames, no look-ahead), so a chunk has all its packets when its frames are in.

    The same frames give the same bytes: a job that begins again after a kill writes the same files once more, and
    whoever holds some of them goes on with the next one.

    Small pictures are enlarged by a whole number: H.264 stores colour at half the size, which blurs a small picture's
    edges, and most players show a small video small.
    """

    def __init__(self, folder: Path, frame_rate: float) -> None:
        self.folder = folder
        self.frames = 0
        self.chunks = 0  # chunks so far
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._shape: tuple[int, ...] = ()
        self._scale = 1
        self._encoder: VideoStream | None = None
        self._reformatter = VideoReformatter()
        # The encoder needs a container that it belongs to; nothing is ever written to this one.
        self._sink = cast(OutputContainer, av.open(io.BytesIO(), "w", format="mp4"))

    def append(self, frames: np.ndarray) -> int:
        """Add one chunk, uint8 (t, H, W, 3) with t >= 1. Returns the number of frames so far.

        Raises:
            UserError: large pictures with odd sides, or of another size than before.
            OSError: the disk is full. All earlier chunks are whole; begin a new writer to go on.
        """
        if self._encoder is None:
            self._encoder = self._start(height=frames.shape[1], width=frames.shape[2])
        if frames.shape[1:] != self._shape:
            raise UserError(f"The frames change from {self._shape[0]}x{self._shape[1]} to {frames.shape[1]}x"
                            f"{frames.shape[2]} after {self.frames} of them; a video has one size.")
        packets: list[av.Packet] = []
        for k, frame in enumerate(frames):
            packets += self._encoder.encode(self._picture(frame, self.frames + k))
        if len(packets) != len(frames):
            raise RuntimeError(f"The H.264 encoder gave {len(packets)} packets for {len(frames)} frames.")
        self._publish(self._mux(packets))
        self.chunks += 1
        self.frames += len(frames)
        return self.frames

    def finish(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Join the chunks to one MP4 at `path`, copied and not encoded again, with `settings` in its comment as JSON.

        Needs constant memory. The chunks stay; remove them when nobody needs them any more. Raises UserError where
        there is no frame.
        """
        self.close()
        with atomic_path(path) as temporary:
            _join(_paths(self.folder)[: self.chunks], str(temporary), settings, "use_metadata_tags+faststart")

    def close(self) -> None:
        """Let the encoder go; the chunks stay. May be called twice."""
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
            raise UserError(f"H.264 needs even sides, these frames are {height}x{width}: use a model with even sides.")
        # Zero latency: every frame's packet comes out at once; a key frame every 2 s makes seeking quick. The number of
        # threads is not the machine's: each writes a slice, so it is part of the bytes.
        options = {"crf": "16", "tune": "zerolatency", "bf": "0"}
        stream = add_h264_stream(self._sink, self._rate, height, width, options, threads=4)
        stream.gop_size = max(1, math.floor(2 * self._rate))
        stream.time_base = 1 / self._rate
        self._sink.start_encoding()  # only now does the stream know its header, which the chunks need
        return stream

    def _picture(self, frame: np.ndarray, time: int) -> av.VideoFrame:
        frame = frame.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        picture = to_yuv420(frame, self._reformatter, threads=1)
        picture.pts, picture.time_base = time, 1 / self._rate
        return picture

    def _mux(self, packets: list[av.Packet]) -> bytes:
        """The next chunk's file: boxes moof and mdat, and for the first one what a file begins with."""
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
            # Of a job that was begun again and goes another way: what followed does not fit any more.
            for later in reversed(_paths(self.folder)[self.chunks :]):
                later.unlink()
        with atomic_path(path) as temporary:
            temporary.write_bytes(chunk)


def chunk_path(folder: Path, number: int) -> Path:
    """Where a video's chunk lies, counted from 0."""
    return folder / CHUNKS / f"{number:06d}.mp4"


def concat_fragments(folder: Path) -> Iterator[bytes]:
    """The video so far as a plain MP4, for browsers without Media Source Extensions. Raises UserError where there is
    no chunk yet. Costs a copy of all chunks (to a temporary file, in constant memory)."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the iterator closes it; so does the end of its life)
    _join(_paths(folder), file, {}, "")
    file.seek(0)

    def read() -> Iterator[bytes]:
        with file:
            while block := file.read(2**16):
                yield block

    return read()


def _paths(folder: Path) -> list[Path]:
    """The chunks that are there, in order, up to the first that is missing."""
    paths: list[Path] = []
    while (path := chunk_path(folder, len(paths))).is_file():
        paths.append(path)
    return paths


class _ConcatenatedFile:
    """Files one after another, as one that can only be read forwards."""

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
    """The kind and the bytes of each box at the top of an MP4 (of boxes under 4 GiB)."""
    place = 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if size < 8:
            raise ValueError(f"no MP4: a box of {size} bytes at {place}")
        yield content[place + 4 : place + 8], content[place : place + size]
        place += size


def display_scale(height: int, width: int) -> int:
    """The whole number by which pictures of this size are enlarged: 1, or an even one, as H.264 wants even sides."""
    short = min(height, width)
    return 1 if short >= SHOWN else 2 * math.ceil(SHOWN / (2 * short))


def read_settings(path: Path, name: str = "") -> dict[str, Any]:
    """The settings that an MP4 of this app, or of `lvdm generate`, carries in its comment, not checked any further.

    Safe for a file of a stranger's: it is read as MP4 and nothing else.

    Args:
        name: what the user calls the file, where that is another name.

    Raises:
        UserError: there are none.
    """
    name = name or path.name
    try:
        # An open file, so that the demuxer has no name beside which it could look for others.
        with path.open("rb") as file, cast(InputContainer, av.open(file, format="mp4",
                                                                   metadata_errors="replace")) as container:
            found = {key.lower(): value for key, value in container.metadata.items()}
        settings = json.loads(found.get("comment", ""))
    except (av.FFmpegError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name} carries no settings: it is no video that this app made, or another program has "
                        "written it again. Choose the file as it was downloaded.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{name} carries no settings of this app: choose a video that it made.")
    return settings


def write_picture(path: Path, frame: np.ndarray) -> None:
    """A still, uint8 (H, W, 3), as a WebP picture, written atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="WEBP", quality=90)
