"""The files below a folder, local or at a URL, listed folder by folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ..utils.backoff import Backoff
from ..utils.errors import UserError
from ..utils.files import path_text
from ..utils.threads import map_ahead
from .failures import is_transient, to_video_error
from .files import iter_files, require_folder
from .sources import MediaRef, info_version_tag, is_url
from .video.reader import VideoError

T = TypeVar("T")
THREADS = 16  # folders of an object store that are listed at once


class TreeFile(NamedTuple):
    name: str  # relative to the folder
    version_tag: str | None  # None: of local files, of which it is asked later
    size: int  # bytes; 0: not known


class Tree:
    """The files below a folder or a URL, by relative name, without hidden ones.

    Attributes:
        unreadable: folders that cannot be listed, and why; complete when `files` has ended.
    """

    def __init__(self, root: str, files: Callable[[list[tuple[str, Any]]], Iterator[TreeFile]]) -> None:
        self.root, self._files = root, files
        self.unreadable: list[tuple[str, Any]] = []
        self._first: str | None = None  # folder with media
        self._several = False
        self._direct = True  # all media lie in direct subfolders

    def files(self) -> Iterator[TreeFile]:
        """Yield all files, in any order."""
        return self._files(self.unreadable)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if is_url(self.root) else os.path.join(self.root, name)

    def note_folder(self, folder: str) -> None:
        """Take note of a folder with a media file."""
        self._several = self._several or self._first not in (None, folder)
        self._first = self._first or folder
        self._direct = self._direct and bool(folder) and "/" not in folder

    @property
    def has_classes(self) -> bool:
        """Whether all media files are in two or more direct subfolders: then these are classes, whose names, with _
        and - as spaces, are the labels."""
        return self._several and self._direct

    def reject(self, name: str, error: Exception) -> tuple[MediaRef, VideoError]:
        """Return the reject for a folder that cannot be listed."""
        path = self.path(name)
        return MediaRef(path_text(name) or ".", path, ""), VideoError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error})",
            "check that it exists and is readable", to_video_error(error, name, remote=is_url(path)).kind)


def open_tree(folder: str, backoff: Backoff) -> Tree:
    """Open a folder. Raises UserError if there is none."""
    if is_url(folder):
        return _remote_tree(folder, backoff)
    require_folder(folder)

    def files(unreadable: list[tuple[str, Any]]) -> Iterator[TreeFile]:
        for name in iter_files(folder, unreadable, lambda action: backoff.run(action, is_transient)):
            yield TreeFile(name, None, 0)

    return Tree(folder, files)


def _remote_tree(url: str, backoff: Backoff) -> Tree:
    import fsspec

    # Listings are read once: a cache of them would only fill the memory.
    fs, path = run_remote(partial(fsspec.core.url_to_fs, url, use_listings_cache=False), url, backoff)

    def files(unreadable: list[tuple[str, Any]]) -> Iterator[TreeFile]:
        for info in _find(fs, path, url, backoff, unreadable):
            name = os.path.relpath(info["name"], path)
            if not any(part.startswith(".") for part in name.split("/")):
                yield TreeFile(name, info_version_tag(info), info.get("size") or 0)

    return Tree(fs.unstrip_protocol(path), files)


def _find(fs: Any, root: str, url: str, backoff: Backoff,
          unreadable: list[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the info of each file below a path. Folders that cannot be listed go to `unreadable`, where fsspec's own
    `find` would silently skip them; but a file system that lists a whole prefix at once does so for each folder of the
    root."""
    found = run_remote(partial(fs.ls, root, detail=True), url, backoff)
    yield from (info for info in found if info["type"] != "directory")
    whole, pending = _lists_whole_prefixes(fs), list(_folders_in(found, root))

    def list_folder(folder: str) -> tuple[str, Iterable[dict[str, Any]], Exception | None]:
        action = partial(fs.find if whole else fs.ls, folder, detail=True)
        try:
            infos = backoff.run(action, partial(is_transient, remote=True))
        except Exception as error:  # each protocol has its own exceptions
            return folder, (), error
        return folder, infos.values() if whole else infos, None

    with ThreadPoolExecutor(THREADS) as pool:
        while pending:
            batch, pending = pending[-1024:], pending[:-1024]
            for folder, infos, error in map_ahead(pool, list_folder, batch, THREADS):
                if error is not None:
                    unreadable.append((os.path.relpath(folder, root), error))
                yield from (info for info in infos if info["type"] != "directory")
                pending += () if whole else _folders_in(infos, folder)


def _folders_in(infos: Iterable[dict[str, Any]], parent: str) -> Iterator[str]:
    for info in infos:
        name = info["name"].rstrip("/")
        hidden = name.rpartition("/")[2].startswith(".")
        if info["type"] == "directory" and name != parent.rstrip("/") and not hidden:
            yield name


def _lists_whole_prefixes(fs: Any) -> bool:
    """Return whether a file system has a `find` of its own, which needs fewer requests than one a folder."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    by_folder = type(fs).find is AbstractFileSystem.find
    return not by_folder or getattr(type(fs), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find


def run_remote(action: Callable[[], T], url: str, backoff: Backoff) -> T:
    """Run an action over the network, with retries. Raises UserError, which names the URL."""
    try:
        return backoff.run(action, partial(is_transient, remote=True))
    except UserError:
        raise
    except Exception as error:  # each protocol has its own exceptions
        raise UserError(f"cannot reach {url}: {error}. Check the address, the network, and that the packages that "
                        "fsspec needs for this protocol are installed") from error
