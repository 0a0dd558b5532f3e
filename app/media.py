"""Video files that grow: an MP4 that is valid after every piece, with its settings inside, and a poster picture."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.stream import VideoStream
from PIL import Image

from odvae.runtime.errors import UserError
from odvae.runtime.files import atomic_path

SHOWN = 256  # the short side, in pixels, that a video should have at least to be looked at


class GrowingVideo:
    """An H.264 MP4 at `path` that can be watched while frames are still being added.

    One encoder lives as long as the video. It holds no frame back (no B-frames, no look-ahead), so after each piece all
    its packets exist: the packets of the file so far are copied, not encoded again, the new ones follow, and the new
    file replaces the old one in one step. No ffmpeg program is needed. `settings` go into the MP4's comment as JSON.

    Small pictures are enlarged by a whole number: H.264 stores colour at half the size, which blurs a small picture's
    edges, and most players show a small video small.
    """

    def __init__(self, path: Path, frame_rate: float, settings: Mapping[str, Any]):
        self.path = path
        self.frames = 0
        self._rate = Fraction(frame_rate).limit_denominator(1001)
        self._settings = dict(settings)
        self._encoder: VideoStream | None = None
        # The encoder needs a container that it belongs to; nothing is ever written to this one.
        self._sink = cast(OutputContainer, av.open(io.BytesIO(), "w", format="mp4"))

    def append(self, frames: np.ndarray) -> int:
        """Add frames, uint8 (t, H, W, 3), and publish the longer file. Returns the number of frames in it.

        Raises UserError for large pictures with odd sides, OSError for a full disk; the file is as before then.
        """
        scale = enlargement(frames.shape[1], frames.shape[2])
        frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
        if self._encoder is None:
            self._encoder = self._start(height=frames.shape[1], width=frames.shape[2])
        packets = []
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = self.frames + k, 1 / self._rate
            packets += self._encoder.encode(picture)
        if len(packets) != len(frames):
            raise RuntimeError(f"The H.264 encoder gave {len(packets)} packets for {len(frames)} frames.")
        with atomic_path(self.path) as temporary:
            self._join(temporary, packets)
        self.frames += len(frames)
        return self.frames

    def close(self) -> None:
        """Let the encoder go. The file is complete already."""
        if self._encoder is not None:
            self._encoder.encode(None)
        self._sink.close()

    def _start(self, height: int, width: int) -> VideoStream:
        if height % 2 or width % 2:
            raise UserError(f"H.264 needs even sides, these frames are {height}x{width}: use a model with even sides.")
        # Zero latency: every frame's packet comes out at once; a key frame every 2 s makes seeking quick.
        options = {"crf": "16", "tune": "zerolatency", "bf": "0"}
        stream = self._sink.add_stream("libx264", rate=self._rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.gop_size = max(1, round(2 * self._rate))
        stream.time_base = stream.codec_context.time_base = 1 / self._rate
        self._sink.start_encoding()  # only now does the stream know its header, which the copies need
        return stream

    def _join(self, target: Path, packets: list[av.Packet]) -> None:
        options = {"movflags": "use_metadata_tags+faststart"}
        with cast(OutputContainer, av.open(str(target), "w", format="mp4", options=options)) as out:
            out.metadata["comment"] = json.dumps({**self._settings, "frames_made": self.frames + len(packets)})
            if self.frames:
                with cast(InputContainer, av.open(str(self.path))) as old:
                    stream = out.add_stream_from_template(old.streams.video[0])
                    for packet in old.demux(video=0):
                        if packet.dts is not None:  # the demuxer ends with an empty packet
                            packet.stream = stream
                            out.mux(packet)
            else:
                stream = out.add_stream_from_template(cast(VideoStream, self._encoder))
            for packet in packets:
                packet.stream = stream
                out.mux(packet)


def enlargement(height: int, width: int) -> int:
    """The whole number by which pictures of this size are enlarged: 1, or an even one, as H.264 wants even sides."""
    short = min(height, width)
    return 1 if short >= SHOWN else 2 * math.ceil(SHOWN / (2 * short))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that an MP4 carries in its comment. Raises UserError where there are none."""
    try:
        with cast(InputContainer, av.open(str(path))) as container:
            settings = json.loads(container.metadata.get("comment", ""))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path} carries no settings of this app ({error}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} carries no settings of this app.")
    return settings


def write_poster(path: Path, frame: np.ndarray) -> None:
    """A still for the history: uint8 (H, W, 3) as a WebP picture, written atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="WEBP", quality=90)
