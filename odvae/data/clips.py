"""Which clips a folder gives: its files, their captions and classes, and the spans that are cut from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UserError
from .failures import printable
from .image import is_animated
from .video import TOLERANCE, VideoError, count_frames, probe

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv",
                    ".3gp", ".gif")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ClipSpec:
    """One span of one file."""

    path: Path
    start: float  # s
    frames: int  # 1 for a photo
    frame_rate: float  # frames a second that the span is sampled at
    caption: str
    caption_from_name: bool = False  # there was no other: the caption is the file's name


@dataclass(frozen=True)
class Listed:
    """A file, or a span of it, of a folder or of a list."""

    path: Path
    start: float = 0.0  # s
    end: float = math.inf  # s
    caption: str | None = None  # None: the file's, see `caption_of`
    label: str | None = None  # its class; the caption where there is no other


@dataclass(frozen=True)
class SetAside:
    """A file, or a span of it, that is not used, and why."""

    path: Path
    reason: str


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS


def list_videos(folder: Path | str, images: bool = False) -> list[Path]:
    """The video files in a folder and the folders below it (the photos too, where asked), sorted; hidden ones not.

    Raises:
        UserError: the folder is missing, is a file, or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder of videos is needed" if folder.exists() else
                        f"there is no folder {folder}")
    wanted = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if images else ())
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        others = sum(path.is_file() for path in folder.iterdir())
        raise UserError(f"{folder} holds no {'videos or photos' if images else 'videos'} ({others} other files in it); "
                        f"looked for {' '.join(wanted)}")
    return found


def list_folder(folder: Path | str, images: bool = False) -> list[Listed]:
    """`list_videos`, with labels where it has a folder for each class: all files lie in folders directly below it, and
    these are several. Their names, with _ and - as spaces, are the labels. Raises UserError as `list_videos`."""
    paths = list_videos(folder, images)
    above = {path.parent for path in paths}
    classes = len(above) > 1 and all(parent.parent == Path(folder) for parent in above)
    return [Listed(path, label=as_text(path.parent.name) if classes else None) for path in paths]


def caption_of(path: Path, label: str | None = None) -> tuple[str, bool]:
    """The caption of a file: the text of the .txt beside it, else the label, else its name with _ and - as spaces (then
    True).

    Raises:
        VideoError: the .txt is not UTF-8.
    """
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip(), False
    except FileNotFoundError:
        return (as_text(path.stem), True) if label is None else (label, False)
    except UnicodeDecodeError as error:
        raise VideoError(f"{text} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8",
                         "caption") from error


def as_text(name: str) -> str:
    return " ".join(printable(name).replace("_", " ").replace("-", " ").split())


def clips_of(file: Path | Listed, frames: int = 33, frame_rate: float = 8.0,
             stride: float | None = None) -> list[ClipSpec]:
    """The clips of one file, or of a listed span of it: a photo gives one of one frame, a video one every `stride`
    seconds (None: back to back).

    Raises:
        VideoError: the file cannot be used, or is (or its span is) shorter than one clip.
    """
    if frames < 1 or not frame_rate > 0 or (stride is not None and not stride > 0):
        raise UserError(f"cannot cut clips of {frames} frames at {frame_rate} a second every {stride} s: all must be "
                        "above 0")
    listed = file if isinstance(file, Listed) else Listed(file)
    path, begin = listed.path, listed.start
    caption, from_name = (caption_of(path, listed.label) if listed.caption is None else (listed.caption, False))
    if is_image(path) and not is_animated(path):
        return [ClipSpec(path, 0.0, 1, frame_rate, caption, from_name)]
    duration = min(probe(path).duration, listed.end) - begin
    stride = frames / frame_rate if stride is None else stride
    count = math.ceil((duration - TOLERANCE - (frames - 1) / frame_rate) / stride)  # starts k * stride that fit
    if count < 1:
        whose = "its" if listed.end == math.inf and not begin else f"from {begin:g} s on its"
        duration = max(0.0, duration)
        raise VideoError(f"{path} is too short: {whose} {duration:.2f} s give {count_frames(duration, frame_rate)} "
                         f"frames at {frame_rate:g} a second, and a clip needs {frames}",
                         "ask for shorter clips or a higher frame rate", "too short")
    return [ClipSpec(path, begin + k * stride, frames, frame_rate, caption, from_name) for k in range(count)]
