"""What an uploaded file holds. Runs in a process of its own, see `uploads`: prints one JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import av
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image, ImageOps, UnidentifiedImageError

from odvae.runtime.errors import UserError

MAX_SIDE = 8192  # pixels
MAX_RATE = 1000  # frames a second
MEMORY = 4 * 2**30  # bytes of address space that the process may take
PROCESSOR = 100  # seconds of the processor that it may take
PATIENCE = 500  # packets in which the first picture must come
# Of a video, which sits in a container that any codec could sit in: those in use, which are well tested.
CODECS = {"h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "theora", "prores",
          "dnxhd", "ffv1", "huffyuv", "gif", "rawvideo", "h263", "png", "qtrle"}
AGAIN = "Copy or download it again, then upload it."
CONVERT = "Convert it to an MP4 with H.264."


def main() -> None:
    """`PATH READER MAX_SECONDS` -> the fields of Upload, or {"problem": what is wrong with it, and what to do}."""
    path, reader, max_seconds = sys.argv[1:4]
    _limit()
    try:
        found = inspect(Path(path), reader, float(max_seconds))
    except UserError as error:
        found = {"problem": str(error)}
    except MemoryError:
        found = {"problem": f"needs too much memory to be read. {CONVERT}"}
    sys.stdout.write(json.dumps(found))


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none of it; a lower limit may be set
        import resource

        os.nice(5)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def inspect(path: Path, reader: str, max_seconds: float) -> dict[str, Any]:
    """kind, width, height, frames, frame_rate and seconds of a file; `reader` is the only one that may open it.

    Raises:
        UserError: it cannot be used. The message continues a sentence that begins with the file's name.
    """
    return _image(path, reader) if reader.isupper() else _video(path, reader, max_seconds)


def _image(path: Path, reader: str) -> dict[str, Any]:
    Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=[reader]) as image:
            _check_sides(*image.size)
            image.load()
            width, height = ImageOps.exif_transpose(image).size
    except UserError:  # is a ValueError too
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"is too large: its sides may have {MAX_SIDE} pixels. Make it smaller.") from error
    except UnidentifiedImageError as error:
        raise UserError("is no image that can be read. Save it again as PNG or JPEG.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"is an image that is damaged or cut off ({_reason(error)}). {AGAIN}") from error
    return {"kind": "image", "width": width, "height": height, "frames": 1, "frame_rate": None, "seconds": None}


def _video(path: Path, reader: str, max_seconds: float) -> dict[str, Any]:
    # Of all formats only this one, also where FFmpeg would guess another; and no other file and no address.
    options = {"format_whitelist": reader, "protocol_whitelist": "file"}
    try:
        container = cast(InputContainer, av.open(str(path), options=options, metadata_errors="replace"))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"cannot be opened as a video ({_reason(error)}): it is something else, or was cut off. "
                        f"{AGAIN}") from error
    with container:
        stream = _stream(container)
        said = (container.duration or 0) / av.time_base  # s, by the header
        if said > max_seconds + 0.5 and reader not in ("mpegts", "mpeg"):  # these only guess it
            raise UserError(_too_long(said, max_seconds))
        frame, count, first, last, end, total = None, 0, math.inf, -math.inf, 0.0, 0.0
        step = float(1 / (stream.average_rate or 25))
        try:
            for packet in container.demux():
                if not packet.size or packet.is_discard:
                    continue
                ticks = packet.dts if packet.pts is None else packet.pts
                unit = float(packet.time_base or 0)
                length = (packet.duration or 0) * unit
                if packet.stream.index != stream.index:
                    total = max(total, (ticks or 0) * unit + length)
                    continue
                if frame is None and count < PATIENCE:
                    frame = _first_picture(packet)
                begin = count * step if ticks is None else ticks * unit
                count, first = count + 1, min(first, begin)
                if begin > last:
                    last, end = begin, begin + (length or step)
                if end - first > max_seconds + 0.5:
                    raise UserError(_too_long(max(said, end - first), max_seconds))
                if packet.is_corrupt:
                    raise UserError(f"is cut off: it breaks off in the middle of frame {count}. {AGAIN}")
        except av.FFmpegError as error:
            raise UserError(f"is cut off or damaged ({_reason(error)}, after {count} frames). {AGAIN}") from error
    if not count:
        raise UserError(f"holds no frame. {AGAIN}")
    if frame is None:
        raise UserError(f"holds no frame that can be decoded. {CONVERT}")
    if count < 0.9 * stream.frames or max(total, end) < 0.9 * said - 0.5 or end - first <= 0:
        raise UserError(f"is cut off: it says that it lasts {said:.1f} s, and {end - first:.1f} s of it "
                        f"({count} frames) are there. {AGAIN}")
    if count / (end - first) > MAX_RATE:
        raise UserError(f"has {count} frames within {end - first:.3g} s: their times are damaged. {CONVERT}")
    upright = (frame.width, frame.height) if frame.rotation % 180 == 0 else (frame.height, frame.width)
    return {"kind": "video", "width": upright[0], "height": upright[1], "frames": count,
            "frame_rate": count / (end - first), "seconds": end - first}


def _stream(container: InputContainer) -> av.VideoStream:
    """The first video stream that is no album's cover, where its codec and size are in order."""
    for stream in container.streams.video:
        if stream.codec_context is None:
            raise UserError(f"has a video that nothing here can decode. {CONVERT}")
        if stream.disposition & Disposition.attached_pic:
            continue
        name = stream.codec_context.codec.canonical_name
        if name not in CODECS:
            raise UserError(f"is encoded as {name}, which is not taken here. {CONVERT}")
        _check_sides(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        return stream
    others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise UserError(f"holds no video, only {others}. Choose a file with pictures.")


def _first_picture(packet: av.Packet) -> av.VideoFrame | None:
    try:
        frame = next(iter(packet.decode()), None)
    except av.FFmpegError:
        return None  # a recording may begin in mid-picture
    if frame is not None:
        _check_sides(frame.width, frame.height)
    return cast("av.VideoFrame | None", frame)


def _check_sides(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise UserError(f"is too large: {width}x{height} pixels, and a side may have {MAX_SIDE}. Make it smaller.")


def _too_long(seconds: float, limit: float) -> str:
    return f"is too long: {seconds:.1f} s, and {limit:g} s are taken at most. Cut it."


def _reason(error: Exception) -> str:
    """A library's words without the path that they may name."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).split(":")[0][:100]
