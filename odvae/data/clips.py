"""Which clips a folder gives: its files, their captions, and the spans that are cut from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import UserError
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
    caption_from_name: bool = False  # no .txt beside the file: the caption is its name


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


def caption_of(path: Path) -> tuple[str, bool]:
    """The caption of a file: the text of the .txt beside it, else its name with _ and - as spaces (then True).

    Raises:
        VideoError: the .txt is not UTF-8.
    """
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip(), False
    except FileNotFoundError:
        return " ".join(path.stem.replace("_", " ").replace("-", " ").split()), True
    except UnicodeDecodeError as error:
        raise VideoError(f"{text} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def clips_of(path: Path, frames: int = 33, frame_rate: float = 8.0, stride: float | None = None) -> list[ClipSpec]:
    """The clips of one file: a photo gives one of one frame, a video one every `stride` seconds (None: back to back).

    Raises:
        VideoError: the file cannot be used, or is shorter than one clip.
    """
    if frames < 1 or not frame_rate > 0 or (stride is not None and not stride > 0):
        raise UserError(f"cannot cut clips of {frames} frames at {frame_rate} a second every {stride} s: all must be "
                        "above 0")
    caption, from_name = caption_of(path)
    if is_image(path):
        return [ClipSpec(path, 0.0, 1, frame_rate, caption, from_name)]
    info = probe(path)
    stride = frames / frame_rate if stride is None else stride
    count = math.ceil((info.duration - TOLERANCE - (frames - 1) / frame_rate) / stride)  # starts k * stride that fit
    if count < 1:
        raise VideoError(f"{path} is too short: its {info.duration:.2f} s give "
                         f"{count_frames(info.duration, frame_rate)} frames at {frame_rate:g} a second, and a clip "
                         f"needs {frames}; ask for shorter clips or a higher frame rate")
    return [ClipSpec(path, k * stride, frames, frame_rate, caption, from_name) for k in range(count)]
