"""The files of a folder: which are videos and photos, which endings are left out, and what their names say."""

from __future__ import annotations

import errno
import heapq
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..utils.errors import UserError
from ..utils.files import path_text
from .manifests import METADATA, ClipRef, read_manifest
from .video.image import is_animated

logger = logging.getLogger("odvae")

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv",
                    ".3gp", ".gif", ".apng")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDECAR_EXTENSIONS = (".txt", ".json")  # beside a file of the same name: its caption, or what some program says about it


@dataclass(frozen=True)
class RejectedFile:
    """A file, or a span of it, that is not used, and why."""

    path: Path
    reason: str


@dataclass
class FolderFiles:
    """The files below a folder, but hidden ones.

    Attributes:
        names: relative to the folder, with / between folders, sorted folder by folder.
        unreadable: (name, error) of folders that cannot be opened, and of what is neither a file nor a folder.
    """

    names: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, OSError]] = field(default_factory=list)


@dataclass(frozen=True)
class MediaFiles:
    """The videos (and photos) below a folder.

    Attributes:
        left_out: files that are not read, counted by ending.
        set_aside: folders that cannot be opened.
    """

    paths: list[Path]
    left_out: Counter[str]
    set_aside: list[RejectedFile]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS


def walk(folder: Path | str) -> FolderFiles:
    """List all files below a folder. Symbolic links to folders are followed.

    Each folder is visited once, real folders before links: so a link to a folder that is there anyway, as in a loop,
    adds nothing, and adding it changes no file's name.
    """
    root, found = os.fspath(folder), FolderFiles()
    seen = set[tuple[int, int]]()
    waiting, links = [""], list[str]()
    while waiting or links:
        name = waiting.pop() if waiting else heapq.heappop(links)
        try:
            for entry in _entries(os.path.join(root, name), seen):
                _sort_entry(entry, f"{name}/{entry.name}" if name else entry.name, waiting, links, found)
        except OSError as error:
            found.unreadable.append((name, error))
    found.names.sort(key=lambda name: name.split("/"))
    return found


def _entries(folder: str, seen: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """Yield what is not hidden in a folder, unless that was `seen` by its device and inode; raises OSError."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) not in seen:
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))


def _sort_entry(entry: os.DirEntry[str], name: str, waiting: list[str], links: list[str], found: FolderFiles) -> None:
    link = entry.is_symlink()
    try:
        if entry.is_dir():
            heapq.heappush(links, name) if link else waiting.append(name)
            return
        if entry.is_file():
            found.names.append(name)
            return
        why = "the link leads nowhere" if link else "neither a file nor a folder"
    except OSError as error:  # a link to itself
        why = error.strerror or str(error)
    found.unreadable.append((name, OSError(errno.ENOENT, why)))


def require_folder(folder: Path | str) -> None:
    """Raise UserError unless it is a folder that is there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder of videos is needed" if folder.exists() else
                        f"there is no folder {folder}")


def find_videos(folder: Path | str, images: bool = False) -> MediaFiles:
    """Find the video files in a folder and the folders below it (the photos too, where asked), sorted; hidden ones not.
    A PNG or WebP that moves is a video.

    Raises:
        UserError: the folder is missing, is a file, or holds none.
    """
    folder = Path(folder)
    require_folder(folder)
    found = walk(folder)
    wanted = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if images else ())
    media = [name for name in found.names
             if suffix_of(name) in wanted or (suffix_of(name) in (".png", ".webp") and is_animated(folder / name))]
    left_out = count_left_out(found.names, media)
    if not media:
        raise UserError(f"{folder} holds no {'videos or photos' if images else 'videos'} "
                        f"({len(found.names)} other files in it); looked for {' '.join(wanted)}")
    return MediaFiles([folder / name for name in media], left_out, unreadable(folder, found))


def unreadable(folder: Path, found: FolderFiles) -> list[RejectedFile]:
    """What of a folder could not be opened."""
    return [RejectedFile(folder / name, f"{folder / name} cannot be read ({error.strerror or error})")
            for name, error in found.unreadable]


def list_videos(folder: Path | str, images: bool = False) -> list[Path]:
    """`find_videos`, the paths alone; folders that cannot be opened are logged."""
    found = find_videos(folder, images)
    for one in found.set_aside:
        logger.warning("%s", one.reason)
    return found.paths


def list_folder(folder: Path | str, images: bool = False, columns: Sequence[str] = ()) -> list[ClipRef]:
    """List the files of a folder as `find_videos`, or where it has metadata.csv, .jsonl or .parquet (the layout of
    Hugging Face's videofolder), what these name. What is left out is logged. Raises UserError as these do."""
    require_folder(folder)
    names = walk(folder).names
    lists = [name for name in names if is_metadata(name)]
    if lists:
        listed = [one for name in lists for one in read_manifest(Path(folder) / name, columns)]
        for line in format_left_out(count_unnamed(names, (os.path.relpath(one.path, folder) for one in listed))):
            logger.warning("%s", line)
        return listed
    found = find_videos(folder, images)
    for line in [one.reason for one in found.set_aside] + format_left_out(found.left_out):
        logger.warning("%s", line)
    return [ClipRef(path) for path in found.paths]


def suffix_of(name: str) -> str:
    """The ending of a name in lower case, with its dot; "" where it has none."""
    return PurePosixPath(name).suffix.lower()


def stem_of(name: str) -> str:
    """A name without its ending, with its folders."""
    return name.removesuffix(PurePosixPath(name).suffix)


def is_metadata(name: str) -> bool:
    """Does a file list those of its folder?"""
    return PurePosixPath(name).name.lower() in METADATA


def count_left_out(names: Iterable[str], media: Iterable[str]) -> Counter[str]:
    """Count the files beside `media` by ending; not the .txt and .json that belong to one of these."""
    used = set(media)
    stems = {stem_of(name) for name in used} | used  # a.txt and a.mp4.json both belong to a.mp4
    return Counter(suffix_of(name) or "no ending" for name in names
                   if name not in used and not (suffix_of(name) in SIDECAR_EXTENSIONS and stem_of(name) in stems))


def count_unnamed(names: Iterable[str], named: Iterable[str]) -> Counter[str]:
    """`count_left_out` for a folder whose metadata names the files to read: the other videos and photos count too."""
    counts = count_left_out((name for name in names if not is_metadata(name)), map(os.path.normpath, named))
    return Counter({f"{ending} (not in the metadata)" if ending in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS else ending:
                    count for ending, count in counts.items()})


def format_left_out(left_out: Mapping[str, int]) -> list[str]:
    """The line of a summary that says which files were not read; none where there are none."""
    ordered = sorted(left_out.items(), key=lambda one: (-one[1], one[0]))
    counts = ", ".join(f"{count} {ending}" for ending, count in ordered)
    return [f"left out, by ending: {counts}"] * bool(left_out)


def name_to_caption(name: str) -> str:
    """A name as a caption, with _ and - as spaces."""
    return " ".join(path_text(name).replace("_", " ").replace("-", " ").split())
