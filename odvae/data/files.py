"""List the files of a folder: its videos and photos, the files left out by extension, and captions from names."""

from __future__ import annotations

import errno
import heapq
import logging
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.errors import UserError
from ..utils.files import path_text
from .manifests import METADATA, ClipRef, read_manifest
from .video.image import is_animated

logger = logging.getLogger("odvae")

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv",
                    ".3gp", ".gif", ".apng")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDECAR_EXTENSIONS = (".txt", ".json")  # beside a file of the same name: its caption, or metadata of some program


@dataclass(frozen=True)
class RejectedFile:
    """A file, or a time span of it, that is not used, and why."""

    path: Path
    reason: str


@dataclass
class FolderFiles:
    """The files below a folder, without hidden ones.

    Attributes:
        names: relative to the folder, with / between folders, sorted folder by folder.
        unreadable: (name, error) of folders that cannot be opened, and of entries that are neither file nor folder.
    """

    names: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, OSError]] = field(default_factory=list)


@dataclass(frozen=True)
class MediaFiles:
    """The videos (and photos) below a folder.

    Attributes:
        left_out: files that are not read, counted by extension.
        set_aside: folders that cannot be opened.
    """

    paths: list[Path]
    left_out: Counter[str]
    set_aside: list[RejectedFile]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS


def walk(folder: Path | str) -> FolderFiles:
    """List all files below a folder, see `iter_files`, sorted folder by folder."""
    files = FolderFiles()
    files.names = sorted(iter_files(folder, files.unreadable), key=lambda name: name.split("/"))
    return files


def iter_files(folder: Path | str, unreadable: list[tuple[str, OSError]],
               retry: Callable[[Callable[[], Any]], Any] = lambda action: action()) -> Iterator[str]:
    """Yield the names of all files below a folder, without hidden ones, with the names of one folder in memory at a
    time. Symbolic links to folders are followed.

    Each folder is visited once, real folders before links: so a link to a folder that is listed anyway, as in a loop,
    adds no files and changes no names.

    Args:
        unreadable: receives (name, error) of folders that cannot be opened, and of entries that are neither file nor
            folder.
        retry: runs the listing of one folder, and may run it again.
    """
    root, seen = os.fspath(folder), set[tuple[int, int]]()
    pending, links = [""], list[str]()
    while pending or links:
        name = pending.pop() if pending else heapq.heappop(links)
        try:
            content = retry(partial(_read_folder, root, name, seen))
        except OSError as error:
            unreadable.append((name, error))
            continue
        if content is not None:
            seen.add(content.identity)
            pending += content.folders
            for link in content.links:
                heapq.heappush(links, link)
            unreadable += content.unreadable
            yield from content.names


@dataclass
class _FolderContent:
    """What lies directly in a folder; names are relative to the root."""

    identity: tuple[int, int]  # device and inode
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders
    unreadable: list[tuple[str, OSError]] = field(default_factory=list)


def _read_folder(root: str, name: str, seen: Container[tuple[int, int]]) -> _FolderContent | None:
    """Read the visible entries of a folder; None if it is in `seen`. Raises OSError."""
    path = os.path.join(root, name)
    info = os.stat(path)
    content = _FolderContent((info.st_dev, info.st_ino))
    if content.identity in seen:
        return None
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                _sort_entry(entry, f"{name}/{entry.name}" if name else entry.name, content)
    return content


def _sort_entry(entry: os.DirEntry[str], name: str, content: _FolderContent) -> None:
    is_link = entry.is_symlink()
    try:
        if entry.is_dir():
            (content.links if is_link else content.folders).append(name)
            return
        if entry.is_file():
            content.names.append(name)
            return
        reason = "broken symbolic link" if is_link else "neither a file nor a folder"
    except OSError as error:  # a link to itself
        reason = error.strerror or str(error)
    content.unreadable.append((name, OSError(errno.ENOENT, reason)))


def require_folder(folder: Path | str) -> None:
    """Raise UserError unless the folder exists."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder of videos is needed" if folder.exists() else
                        f"there is no folder {folder}")


def find_videos(folder: Path | str, images: bool = False) -> MediaFiles:
    """Find the video files in a folder and its subfolders (with `images` the photos too), sorted, without hidden ones.
    An animated PNG or WebP is a video.

    Raises:
        UserError: the folder is missing, is a file, or holds none.
    """
    folder = Path(folder)
    require_folder(folder)
    files = walk(folder)
    extensions = VIDEO_EXTENSIONS + (IMAGE_EXTENSIONS if images else ())
    media = [name for name in files.names
             if suffix_of(name) in extensions or (suffix_of(name) in (".png", ".webp") and is_animated(folder / name))]
    left_out = count_left_out(files.names, media)
    if not media:
        raise UserError(f"{folder} holds no {'videos or photos' if images else 'videos'} "
                        f"({len(files.names)} other files in it); expected {' '.join(extensions)}")
    return MediaFiles([folder / name for name in media], left_out, unreadable(folder, files))


def unreadable(folder: Path, files: FolderFiles) -> list[RejectedFile]:
    """Return the entries of a folder that could not be opened."""
    return [RejectedFile(folder / name, f"{folder / name} cannot be read ({error.strerror or error})")
            for name, error in files.unreadable]


def list_videos(folder: Path | str, images: bool = False) -> list[Path]:
    """Return the paths of `find_videos`; folders that cannot be opened are logged."""
    files = find_videos(folder, images)
    for rejected in files.set_aside:
        logger.warning("%s", rejected.reason)
    return files.paths


def list_folder(folder: Path | str, images: bool = False, columns: Sequence[str] = ()) -> list[ClipRef]:
    """List the files of a folder as `find_videos`, or the files that its metadata.csv, .jsonl or .parquet name (the
    layout of Hugging Face's videofolder). Files left out are logged. Raises UserError as these do."""
    require_folder(folder)
    names = walk(folder).names
    lists = [name for name in names if is_metadata(name)]
    if lists:
        clips = [clip for name in lists for clip in read_manifest(Path(folder) / name, columns)]
        for line in format_left_out(count_unnamed(names, (os.path.relpath(clip.path, folder) for clip in clips))):
            logger.warning("%s", line)
        return clips
    files = find_videos(folder, images)
    for line in [rejected.reason for rejected in files.set_aside] + format_left_out(files.left_out):
        logger.warning("%s", line)
    return [ClipRef(path) for path in files.paths]


def suffix_of(name: str) -> str:
    """Return the extension of a name in lower case, with its dot; "" if it has none."""
    return PurePosixPath(name).suffix.lower()


def stem_of(name: str) -> str:
    """Return a name without its extension, with its folders."""
    return name.removesuffix(PurePosixPath(name).suffix)


def is_metadata(name: str) -> bool:
    """Return whether a file lists the files of its folder."""
    return PurePosixPath(name).name.lower() in METADATA


def count_left_out(names: Iterable[str], media: Iterable[str]) -> Counter[str]:
    """Count the files other than `media` by extension, without the .txt and .json that belong to one of these."""
    used = set(media)
    stems = {stem_of(name) for name in used} | used  # a.txt and a.mp4.json both belong to a.mp4
    return Counter(suffix_of(name) or "no extension" for name in names
                   if name not in used and not (suffix_of(name) in SIDECAR_EXTENSIONS and stem_of(name) in stems))


def count_unnamed(names: Iterable[str], named: Iterable[str]) -> Counter[str]:
    """Count the files left out of a folder whose metadata names the files to read, with the other videos and photos."""
    counts = count_left_out((name for name in names if not is_metadata(name)), map(os.path.normpath, named))
    return Counter({f"{suffix} (not in the metadata)" if suffix in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS else suffix:
                    count for suffix, count in counts.items()})


def format_left_out(left_out: Mapping[str, int]) -> list[str]:
    """Return the summary line for the files that were not read; empty if there are none."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    counts = ", ".join(f"{count} {suffix}" for suffix, count in ordered)
    return [f"left out, by extension: {counts}"] * bool(left_out)


def name_to_caption(name: str) -> str:
    """Turn a file name into a caption, with _ and - as spaces."""
    return " ".join(path_text(name).replace("_", " ").replace("-", " ").split())
