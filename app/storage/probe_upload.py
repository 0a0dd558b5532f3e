"""Probe an uploaded file. Runs in a process of its own, see `uploads`, and prints one JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from odvae.data.video.file import ReadPolicy
from odvae.data.video.image import is_animated, read_image
from odvae.data.video.reader import VideoError, VideoReader
from odvae.utils.errors import UserError

MAX_SIDE = 8192  # pixels
MAX_RATE = 1000  # frames a second
MEMORY = 4 * 2**30  # bytes of address space
CPU_SECONDS = 100
# A container could hold any codec: only those in wide use, which are well tested, are decoded.
CODECS = frozenset({"h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "theora",
                    "prores", "dnxhd", "ffv1", "huffyuv", "gif", "rawvideo", "h263", "png", "qtrle"})
CONVERT = "convert it to an MP4 with H.264"


def main() -> None:
    """`PATH READER MAX_SECONDS` -> the fields of Upload, or {"problem": what is wrong with it, and what to do}."""
    path, reader, max_seconds = sys.argv[1:4]
    _limit()
    try:
        result = probe(Path(path), reader, float(max_seconds))
    except UserError as error:
        result = {"problem": str(error)}
    except MemoryError:
        result = {"problem": f"needs too much memory to be read; {CONVERT}"}
    sys.stdout.write(json.dumps(result))


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; a lower limit may be set
        import resource

        os.nice(5)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def probe(path: Path, reader: str, max_seconds: float) -> dict[str, Any]:
    """Return kind, width, height, frames, frame_rate and seconds of a file. Only `reader` may open it.

    Raises:
        UserError: it cannot be used. The message continues a sentence that begins with the file name.
    """
    Image.MAX_IMAGE_PIXELS = None  # the policy has its own limit
    policy = ReadPolicy(reader, CODECS, MAX_SIDE, max_seconds, require_complete=True)
    try:
        if reader.isupper() and not is_animated(path):
            height, width = read_image(path, policy).shape[1:3]
            return {"kind": "image", "width": width, "height": height, "frames": 1, "frame_rate": None,
                    "seconds": None}
        with VideoReader(path, policy=policy) as video:
            info = video.info
    except VideoError as error:
        raise UserError(str(error).removeprefix(str(path)).lstrip(" :")) from error
    if info.frame_rate > MAX_RATE:
        raise UserError(f"has {info.frames} frames in {info.duration:.3g} s: its timestamps are damaged; {CONVERT}")
    return {"kind": "video", "width": info.width, "height": info.height, "frames": info.frames,
            "frame_rate": info.frame_rate, "seconds": info.duration}
