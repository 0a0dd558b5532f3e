"""Photos, and pictures that move (GIF, animated PNG and WebP), as a viewer shows them: upright, opaque, in sRGB."""

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
from .file import ANYTHING, ReadPolicy

ANIMATED = ("GIF", "PNG", "WEBP")
SHORTEST = 0.02  # s; browsers show frames that ask for less ...
USUAL = 0.1  # s ... for so long


def read_image(path: Path | str, policy: ReadPolicy = ANYTHING) -> np.ndarray:
    """Read a photo as a video of one frame: uint8 (1, H, W, 3), upright, in sRGB, over white where it is transparent.

    Args:
        policy: limits on what is opened.

    Raises:
        VideoError: there is no such file, it is no image, or it is damaged.
    """
    with _reading(path), Image.open(path, formats=policy.image_formats) as image:
        policy.check_size(path, *image.size)
        return _pixels(image)[None]


def is_animated(path: Path | str) -> bool:
    """Whether a file is a picture of several frames; False too where it is no picture, or not there."""
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
    """The frames of a picture that moves, by number, best in rising order.

    Attributes:
        times: (N,) s at which frames begin, from 0.
        duration: s, to the end of the last.
        height, width: pixels.
        notes: what is done to the pictures, for the user to know.
    """

    def __init__(self, path: Path | str, policy: ReadPolicy = ANYTHING) -> None:
        self._path = path
        with _reading(path):
            self._image: Any = Image.open(path, formats=policy.image_formats or ANIMATED)
            try:
                policy.check_size(path, *self._image.size)
                ends = list(accumulate(_length(frame) for frame in ImageSequence.Iterator(self._image)))
            except BaseException:
                self.close()
                raise
        policy.check_length(path, ends[-1])
        self.times, self.duration = np.array([0.0, *ends[:-1]]), ends[-1]
        self.width, self.height = self._image.size
        self.notes = ("transparent pixels on white",) if _is_transparent(self._image) else ()

    def picture(self, rank: int) -> np.ndarray:
        """Frame `rank` as uint8 (H, W, 3). Raises VideoError."""
        with _reading(self._path):
            self._image.seek(rank)
            return _pixels(self._image)

    def close(self) -> None:
        self._image.close()


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn what Pillow raises into VideoError."""
    try:
        yield
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{path}: there is no such file", kind="missing") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        if isinstance(error, UnidentifiedImageError):
            raise VideoError(f"{path} is no image that can be read", "save it again as PNG or JPEG") from error
        raise VideoError(f"{path} is an image that is damaged or cut off ({error})",
                         "copy or download it again, or save it again as PNG or JPEG") from error


def _pixels(image: Any) -> np.ndarray:
    """uint8 (H, W, 3) of the current frame."""
    image = _in_srgb(ImageOps.exif_transpose(_in_8_bits(image)))
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,)), image)
    return np.asarray(image.convert("RGB")).copy()


def _in_8_bits(image: Any) -> Any:
    """Grey of 16 bits as 8: Pillow clips it at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = Image.fromarray((np.asarray(image).astype(np.uint32) + 128) // 257).convert("L")
        grey.info = {**image.info}
        grey.info.pop("transparency", None)
        return grey
    return image


def _in_srgb(image: Any) -> Any:
    """Colours of another profile (Display P3, Adobe RGB, a printer's CMYK) as sRGB's, transparency kept."""
    data = image.info.get("icc_profile")
    if not data or image.mode in ("1", "L", "LA", "I", "F"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if image.mode in ("P", "PA") or (image.mode == "RGB" and "transparency" in image.info):
            image = image.convert("RGBA" if _is_transparent(image) else "RGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, profile, _SRGB, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # a profile that is damaged or of another kind of colour
        return image


_SRGB = ImageCms.createProfile("sRGB")


def _is_transparent(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _length(frame: Any) -> float:
    frame.load()
    seconds = float(frame.info.get("duration") or 0) / 1000
    return seconds if seconds >= SHORTEST else USUAL
