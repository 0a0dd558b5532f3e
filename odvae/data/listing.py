"""What a source holds: folders, lists, tars in WebDataset's layout, here or at a URL; each file with its captions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..utils.backoff import Backoff
from ..utils.errors import UserError
from ..utils.files import path_text
from .entries import MEDIA, ListedFile, Listing, decode_text, read_captions
from .failures import is_transient, to_video_error
from .files import (
    FolderFiles,
    count_left_out,
    count_unnamed,
    is_metadata,
    name_to_caption,
    require_folder,
    stem_of,
    suffix_of,
    walk,
)
from .manifests import ManifestRow, is_manifest, read_rows
from .sources import MediaRef, info_version_tag, is_url, local_version_tag, open_path, version_tag_of
from .tars import list_tars
from .video.reader import VideoError

T = TypeVar("T")


@dataclass(frozen=True)
class _Tree:
    """The files below a folder or a URL, by their names relative to it."""

    root: str
    names: Sequence[str]
    version_tags: Mapping[str, str] | None  # None: the files are local
    unreadable: Sequence[tuple[str, Exception]] = ()

    def path(self, name: str) -> str:
        return os.path.join(self.root, name) if self.version_tags is None else f"{self.root.rstrip('/')}/{name}"

    def ref(self, name: str) -> MediaRef:
        path = self.path(name)
        return MediaRef(
            path_text(name), path, local_version_tag(Path(path)) if self.version_tags is None else self.version_tags[name]
        )

    def read(self, name: str) -> bytes:
        with open_path(self.path(name)) as file:
            data: bytes = file.read()
            return data


def list_entries(source: Path | str, columns: Sequence[str] = (), backoff: Backoff | None = None) -> Listing:
    """List what a source holds.

    Args:
        source: a folder with the folders below it (its photos too), a list (.jsonl, .csv, .parquet), a tar or a folder
            of tars in WebDataset's layout, a folder of Parquet files; each of them here, or at a URL. A folder with
            metadata.csv, .jsonl or .parquet holds what these name.
        columns: of lists, as `manifests.parse_columns` takes them.
        backoff: how failures that may pass are retried; None: not at all.

    Raises:
        UserError: there is no such thing, or nothing in it; a list that cannot be read.
    """
    text, backoff = str(source), backoff or Backoff(0)
    if text.endswith(".tar"):
        return list_tars([text], text.rpartition("/")[0], backoff)
    if is_manifest(PurePosixPath(text) if is_url(text) else Path(text)):
        return _lists([text], text.rpartition("/")[0] if is_url(text) else str(Path(text).parent), columns, backoff)
    tree = _remote_tree(text, backoff) if is_url(text) else _local_tree(text, backoff)
    listing = _tree_entries(tree, columns, backoff)
    for name, error in tree.unreadable:
        listing.set_aside.append((MediaRef(path_text(name) or ".", tree.path(name), ""), VideoError(
            f"{tree.path(name)} cannot be read ({getattr(error, 'strerror', None) or error})",
            "see that it is there and who may read it", to_video_error(error, name, remote=is_url(text)).kind)))
    return listing


def _tree_entries(tree: _Tree, columns: Sequence[str], backoff: Backoff) -> Listing:
    tars = [name for name in tree.names if name.endswith(".tar")]
    if tars:
        found = list_tars([tree.path(name) for name in tars], tree.root, backoff)
        return found._replace(left_out=found.left_out + count_left_out(tree.names, tars))
    lists = [name for name in tree.names if is_metadata(name)]
    media = [name for name in tree.names if suffix_of(name) in MEDIA]
    if not lists and not media:
        lists = [name for name in tree.names if suffix_of(name) == ".parquet"]
    if lists:
        found = _lists([tree.path(name) for name in lists], tree.root, columns, backoff, tree.version_tags)
        named = (entry.ref.name for entry in found.entries)
        return found._replace(left_out=count_unnamed((name for name in tree.names if name not in lists), named))
    if not media:
        raise UserError(f"{tree.root} holds no videos or photos ({len(tree.names)} other files in it); looked for "
                        f"{' '.join(MEDIA)}")
    return _media(tree, media, backoff)


def _media(tree: _Tree, media: Sequence[str], backoff: Backoff) -> Listing:
    """A folder's files. The labels, where it has a folder for each class: all files lie in folders directly below it,
    and these are several. Their names, with _ and - as spaces, are the labels."""
    texts = {stem_of(name): name for name in reversed(tree.names) if suffix_of(name) == ".txt"}
    above = {name.rpartition("/")[0] for name in media}
    classes = len(above) > 1 and all(folder and "/" not in folder for folder in above)

    def caption(text: str) -> list[str]:
        return [decode_text(tree.read(text), tree.path(text))]

    found = []
    for name in media:
        label = name_to_caption(name.rpartition("/")[0]) if classes else None
        text = texts.get(stem_of(name))
        found.append(
            ListedFile(ManifestRow(name), tree.ref(name), label, None if text is None else partial(caption, text))
        )
    return read_captions(found, backoff)._replace(left_out=count_left_out(tree.names, media))


def _lists(lists: Sequence[str], root: str, columns: Sequence[str], backoff: Backoff,
           version_tags: Mapping[str, str] | None = None) -> Listing:
    """The rows of lists. A relative path in one begins at the list's own folder or URL."""
    found: list[ListedFile] = []
    for path in lists:
        base, version_tag = path.rpartition("/")[0] or ".", version_tag_of(path)
        for row in _rows_of(path, columns, backoff):
            if row.cell is not None:
                name = f"{_below(path, root)}::{row.path or f'row-{row.cell[1]}'}"
                ref = MediaRef(path_text(name), path, f"{version_tag}:{row.cell[1]}", row.cell[1], None, row.cell[0])
                found.append(ListedFile(replace(row, path=row.path or name), ref))
                continue
            file = row.path if is_url(row.path) or row.path.startswith("/") else f"{base}/{row.path}"
            if is_url(file):
                known = (version_tags or {}).get(_below(file, root))
                ref = MediaRef(
                    row.path if is_url(row.path) else _below(file, root), file, known or version_tag_of(file)
                )
                found.append(ListedFile(row, ref))
            else:
                ref = MediaRef(
                    path_text(Path(os.path.relpath(file, root)).as_posix()), file, local_version_tag(Path(file))
                )
                found.append(ListedFile(row, ref, None, None if row.captions else _beside(Path(file))))
    return read_captions(found, backoff)


def _rows_of(path: str, columns: Sequence[str], backoff: Backoff) -> list[ManifestRow]:
    if not is_url(path):
        return backoff.run(partial(read_rows, path, columns), is_transient)

    def attempt() -> list[ManifestRow]:
        with open_path(path) as file:
            return read_rows(path, columns, file)

    try:
        return _run_with_backoff(backoff, attempt)
    except UserError:
        raise
    except Exception as error:  # each protocol has exceptions of its own
        raise UserError(f"cannot reach {path}: {error}. Check the address and the network") from error


def _beside(path: Path) -> Callable[[], Sequence[str]] | None:
    """What reads the caption of a local file: the text of the .txt beside it."""
    for ending in (".txt", ".TXT", ".Txt"):
        text = path.with_suffix(ending)
        if text.is_file():
            return partial(_read_text, text)
    return None


def _read_text(path: Path) -> list[str]:
    return [decode_text(path.read_bytes(), str(path))]


def _below(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _local_tree(folder: str, backoff: Backoff) -> _Tree:
    require_folder(folder)
    found = FolderFiles()

    def attempt() -> None:
        nonlocal found
        found = walk(folder)
        for _, error in found.unreadable:
            if is_transient(error):
                raise error

    with contextlib.suppress(OSError):  # which does not pass
        backoff.run(attempt, is_transient)
    return _Tree(folder, found.names, None, found.unreadable)


def _remote_tree(url: str, backoff: Backoff) -> _Tree:
    try:
        import fsspec

        fs, path = _run_with_backoff(backoff, partial(fsspec.core.url_to_fs, url))
        found, unreadable = _find(fs, path, backoff)
    except Exception as error:  # each protocol has exceptions of its own
        raise UserError(f"cannot reach {url}: {error}. Check the address, the network, and that fsspec has what this "
                        "protocol needs") from error
    version_tags = {os.path.relpath(name, path): info_version_tag(info) for name, info in sorted(found.items())}
    names = [name for name in version_tags if not any(part.startswith(".") for part in name.split("/"))]
    return _Tree(fs.unstrip_protocol(path), sorted(names, key=lambda name: name.split("/")), version_tags,
                 [(os.path.relpath(name, path), error) for name, error in unreadable])


def _find(fs: Any, root: str, backoff: Backoff) -> tuple[dict[str, dict[str, Any]], list[tuple[str, Exception]]]:
    """What a system tells of each file below a path, and which folders it cannot list and why.

    Some list all at once, or fail. For the others fsspec's `find` would leave out in silence what cannot be listed.
    """
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    by_folder = type(fs).find is AbstractFileSystem.find
    if not by_folder or getattr(type(fs), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find:
        return _run_with_backoff(backoff, partial(fs.find, root, detail=True)), []
    found, unreadable, waiting = dict[str, dict[str, Any]](), list[tuple[str, Exception]](), [root]
    while waiting:
        folder = waiting.pop()
        try:
            listed = _run_with_backoff(backoff, partial(fs.ls, folder, detail=True))
        except Exception as error:
            if folder == root:
                raise
            unreadable.append((folder, error))
            continue
        for info in listed:
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                found[name] = info
            elif name != folder.rstrip("/") and not name.rpartition("/")[2].startswith("."):
                waiting.append(name)
    return found, unreadable


def _run_with_backoff(backoff: Backoff, action: Callable[[], T]) -> T:
    """The result of an action over the network."""
    return backoff.run(action, partial(is_transient, remote=True))
