"""Read photos and animated images (GIF, PNG and WebP) as a viewer shows them: upright, opaque, in sRGB."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from ..errors import VideoError
from .display import BACKGROUND
from .file import NO_LIMITS, ReadPolicy

ANIMATED = ("GIF", "PNG", "WEBP")
MIN_DELAY = 0.02  # s; browsers show a frame with a shorter delay ...
DEFAULT_DELAY = 0.1  # s ... for this long


def read_image(path: Path | str, policy: ReadPolicy = NO_LIMITS) -> np.ndarray:
    """Read a photo as a video of one frame: uint8 (1, H, W, 3), upright, in sRGB, transparent pixels on white.

    Args:
        policy: limits for opening it.

    Raises:
        VideoError: no such file, not an image, or a damaged one.
    """
    with _converted_errors(path), Image.open(path, formats=policy.image_formats) as image:
        policy.check_size(path, *image.size)
        return _pixels(image)[None]


def is_animated(path: Path | str) -> bool:
    """Return whether a file is an image of several frames; False also if it is missing or not an image."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
        if not (head.startswith((b"GIF8", b"\x89PNG")) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")):
            return False
        with Image.open(path, formats=ANIMATED) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


class AnimatedImage:
    """The frames of an animated image by number, fastest in rising order.

    Attributes:
        times: (N,) s, start of each frame, from 0.
        duration: s, to the end of the last frame.
        height, width: pixels.
        notes: conversions applied to the frames, to show to the user.
    """

    def __init__(self, path: Path | str, policy: ReadPolicy = NO_LIMITS) -> None:
        self._path = path
        with _converted_errors(path):
            self._image: Any = Image.open(path, formats=policy.image_formats or ANIMATED)
            try:
                policy.check_size(path, *self._image.size)
                ends = list(accumulate(_frame_delay(frame) for frame in ImageSequence.Iterator(self._image)))
            except BaseException:
                self.close()
                raise
        policy.check_length(path, ends[-1])
        self.times, self.duration = np.array([0.0, *ends[:-1]]), ends[-1]
        self.width, self.height = self._image.size
        self.notes = ("transparent pixels on white",) if _is_transparent(self._image) else ()

    def picture(self, number: int) -> np.ndarray:
        """Return a frame as uint8 (H, W, 3). Raises VideoError."""
        with _converted_errors(self._path):
            self._image.seek(number)
            return _pixels(self._image)

    def close(self) -> None:
        self._image.close()


@contextlib.contextmanager
def _converted_errors(path: Path | str) -> Iterator[None]:
    """Convert Pillow's exceptions to VideoError."""
    try:
        yield
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        if isinstance(error, UnidentifiedImageError):
            raise VideoError(f"{path} is not a readable image", "save it again as PNG or JPEG") from error
        raise VideoError(f"{path} is a damaged or truncated image ({error})",
                         "copy or download it again, or save it again as PNG or JPEG") from error


def _pixels(image: Any) -> np.ndarray:
    """Return the current frame as uint8 (H, W, 3)."""
    image = _in_srgb(ImageOps.exif_transpose(_in_8_bits(image)))
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,)), image)
    return np.asarray(image.convert("RGB")).copy()


def _in_8_bits(image: Any) -> Any:
    """Convert 16-bit grey to 8 bits, because Pillow clips it at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = Image.fromarray((np.asarray(image).astype(np.uint32) + 128) // 257).convert("L")
        grey.info = {**image.info}
        grey.info.pop("transparency", None)
        return grey
    return image


def _in_srgb(image: Any) -> Any:
    """Convert from the image's profile (Display P3, Adobe RGB, CMYK) to sRGB, keeping transparency."""
    data = image.info.get("icc_profile")
    if not data or image.mode in ("1", "L", "LA", "I", "F"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if image.mode in ("P", "PA") or (image.mode == "RGB" and "transparency" in image.info):
            image = image.convert("RGBA" if _is_transparent(image) else "RGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, profile, _SRGB, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of another colour model
        return image


_SRGB = ImageCms.createProfile("sRGB")


def _is_transparent(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _frame_delay(frame: Any) -> float:
    frame.load()
    seconds = float(frame.info.get("duration") or 0) / 1000
    return seconds if seconds >= MIN_DELAY else DEFAULT_DELAY
