"""List a source's files with their captions: folders, lists and WebDataset tars, local or at a URL."""

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
    """The files below a folder or a URL, by relative name."""

    root: str
    names: Sequence[str]
    version_tags: Mapping[str, str] | None  # None for local files
    unreadable: Sequence[tuple[str, Exception]] = ()

    def path(self, name: str) -> str:
        return os.path.join(self.root, name) if self.version_tags is None else f"{self.root.rstrip('/')}/{name}"

    def ref(self, name: str) -> MediaRef:
        path = self.path(name)
        version_tag = local_version_tag(Path(path)) if self.version_tags is None else self.version_tags[name]
        return MediaRef(path_text(name), path, version_tag)

    def read(self, name: str) -> bytes:
        with open_path(self.path(name)) as file:
            data: bytes = file.read()
            return data


def list_entries(source: Path | str, columns: Sequence[str] = (), backoff: Backoff | None = None) -> Listing:
    """List the videos and photos of a source.

    Args:
        source: a folder and its subfolders, a list (.jsonl, .csv, .parquet), a WebDataset tar or a folder of them, or a
            folder of Parquet files; each local or at a URL. Of a folder with metadata.csv, .jsonl or .parquet, only the
            files that these name.
        columns: of lists, as `manifests.parse_columns` takes them.
        backoff: how transient failures are retried; None: not at all.

    Raises:
        UserError: no such source, an empty one, or an unreadable list.
    """
    text, backoff = str(source), backoff or Backoff(0)
    if text.endswith(".tar"):
        return list_tars([text], text.rpartition("/")[0], backoff)
    if is_manifest(PurePosixPath(text) if is_url(text) else Path(text)):
        root = text.rpartition("/")[0] if is_url(text) else str(Path(text).parent)
        return _manifest_entries([text], root, columns, backoff)
    tree = _remote_tree(text, backoff) if is_url(text) else _local_tree(text, backoff)
    listing = _tree_entries(tree, columns, backoff)
    for name, error in tree.unreadable:
        listing.set_aside.append((MediaRef(path_text(name) or ".", tree.path(name), ""), VideoError(
            f"{tree.path(name)} cannot be read ({getattr(error, 'strerror', None) or error})",
            "check that it exists and is readable", to_video_error(error, name, remote=is_url(text)).kind)))
    return listing


def _tree_entries(tree: _Tree, columns: Sequence[str], backoff: Backoff) -> Listing:
    tars = [name for name in tree.names if name.endswith(".tar")]
    if tars:
        listing = list_tars([tree.path(name) for name in tars], tree.root, backoff)
        return listing._replace(left_out=listing.left_out + count_left_out(tree.names, tars))
    lists = [name for name in tree.names if is_metadata(name)]
    media = [name for name in tree.names if suffix_of(name) in MEDIA]
    if not lists and not media:
        lists = [name for name in tree.names if suffix_of(name) == ".parquet"]
    if lists:
        listing = _manifest_entries([tree.path(name) for name in lists], tree.root, columns, backoff,
                                    tree.version_tags)
        named = (entry.ref.name for entry in listing.entries)
        return listing._replace(left_out=count_unnamed((name for name in tree.names if name not in lists), named))
    if not media:
        raise UserError(f"{tree.root} holds no videos or photos ({len(tree.names)} other files in it); expected "
                        f"{' '.join(MEDIA)}")
    return _media_entries(tree, media, backoff)


def _media_entries(tree: _Tree, media: Sequence[str], backoff: Backoff) -> Listing:
    """List a folder's files. If all of them are in two or more direct subfolders, these are classes: their names, with
    _ and - as spaces, are the labels."""
    texts = {stem_of(name): name for name in reversed(tree.names) if suffix_of(name) == ".txt"}
    folders = {name.rpartition("/")[0] for name in media}
    has_classes = len(folders) > 1 and all(folder and "/" not in folder for folder in folders)

    def caption(text: str) -> list[str]:
        return [decode_text(tree.read(text), tree.path(text))]

    files = []
    for name in media:
        label = name_to_caption(name.rpartition("/")[0]) if has_classes else None
        text = texts.get(stem_of(name))
        read = None if text is None else partial(caption, text)
        files.append(ListedFile(ManifestRow(name), tree.ref(name), label, read))
    return read_captions(files, backoff)._replace(left_out=count_left_out(tree.names, media))


def _manifest_entries(lists: Sequence[str], root: str, columns: Sequence[str], backoff: Backoff,
           version_tags: Mapping[str, str] | None = None) -> Listing:
    """List the rows of manifests. Relative paths are relative to the manifest's own folder or URL."""
    files: list[ListedFile] = []
    for path in lists:
        base, version_tag = path.rpartition("/")[0] or ".", version_tag_of(path)
        for row in _read_rows(path, columns, backoff):
            if row.cell is not None:
                name = f"{_relative_to(path, root)}::{row.path or f'row-{row.cell[1]}'}"
                ref = MediaRef(path_text(name), path, f"{version_tag}:{row.cell[1]}", row.cell[1], None, row.cell[0])
                files.append(ListedFile(replace(row, path=row.path or name), ref))
                continue
            file = row.path if is_url(row.path) or row.path.startswith("/") else f"{base}/{row.path}"
            if is_url(file):
                known = (version_tags or {}).get(_relative_to(file, root))
                ref = MediaRef(
                    row.path if is_url(row.path) else _relative_to(file, root), file, known or version_tag_of(file)
                )
                files.append(ListedFile(row, ref))
            else:
                ref = MediaRef(
                    path_text(Path(os.path.relpath(file, root)).as_posix()), file, local_version_tag(Path(file))
                )
                files.append(ListedFile(row, ref, None, None if row.captions else _sidecar_caption(Path(file))))
    return read_captions(files, backoff)


def _read_rows(path: str, columns: Sequence[str], backoff: Backoff) -> list[ManifestRow]:
    if not is_url(path):
        return backoff.run(partial(read_rows, path, columns), is_transient)

    def attempt() -> list[ManifestRow]:
        with open_path(path) as file:
            return read_rows(path, columns, file)

    try:
        return _run_with_backoff(backoff, attempt)
    except UserError:
        raise
    except Exception as error:  # each protocol has its own exceptions
        raise UserError(f"cannot reach {path}: {error}. Check the address and the network") from error


def _sidecar_caption(path: Path) -> Callable[[], Sequence[str]] | None:
    """Return a function that reads the .txt beside a local file; None if there is none."""
    for suffix in (".txt", ".TXT", ".Txt"):
        text = path.with_suffix(suffix)
        if text.is_file():
            return partial(_read_sidecar, text)
    return None


def _read_sidecar(path: Path) -> list[str]:
    return [decode_text(path.read_bytes(), str(path))]


def _relative_to(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _local_tree(folder: str, backoff: Backoff) -> _Tree:
    require_folder(folder)
    files = FolderFiles()

    def attempt() -> None:
        nonlocal files
        files = walk(folder)
        for _, error in files.unreadable:
            if is_transient(error):
                raise error

    with contextlib.suppress(OSError):  # retried in vain; it is in `unreadable`
        backoff.run(attempt, is_transient)
    return _Tree(folder, files.names, None, files.unreadable)


def _remote_tree(url: str, backoff: Backoff) -> _Tree:
    try:
        import fsspec

        fs, path = _run_with_backoff(backoff, partial(fsspec.core.url_to_fs, url))
        files, unreadable = _find_remote(fs, path, backoff)
    except Exception as error:  # each protocol has its own exceptions
        raise UserError(f"cannot reach {url}: {error}. Check the address, the network, and that the packages that "
                        "fsspec needs for this protocol are installed") from error
    version_tags = {os.path.relpath(name, path): info_version_tag(info) for name, info in sorted(files.items())}
    names = [name for name in version_tags if not any(part.startswith(".") for part in name.split("/"))]
    return _Tree(fs.unstrip_protocol(path), sorted(names, key=lambda name: name.split("/")), version_tags,
                 [(os.path.relpath(name, path), error) for name, error in unreadable])


def _find_remote(fs: Any, root: str, backoff: Backoff) -> tuple[dict[str, dict[str, Any]], list[tuple[str, Exception]]]:
    """Return the info of each file below a path, and the folders that cannot be listed and why.

    Some file systems list everything at once, or fail. For the others, fsspec's `find` would silently skip what cannot
    be listed.
    """
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    by_folder = type(fs).find is AbstractFileSystem.find
    if not by_folder or getattr(type(fs), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find:
        return _run_with_backoff(backoff, partial(fs.find, root, detail=True)), []
    files, unreadable, pending = dict[str, dict[str, Any]](), list[tuple[str, Exception]](), [root]
    while pending:
        folder = pending.pop()
        try:
            entries = _run_with_backoff(backoff, partial(fs.ls, folder, detail=True))
        except Exception as error:
            if folder == root:
                raise
            unreadable.append((folder, error))
            continue
        for info in entries:
            name = info["name"].rstrip("/")
            if info["type"] != "directory":
                files[name] = info
            elif name != folder.rstrip("/") and not name.rpartition("/")[2].startswith("."):
                pending.append(name)
    return files, unreadable


def _run_with_backoff(backoff: Backoff, action: Callable[[], T]) -> T:
    """Run an action over the network, with retries."""
    return backoff.run(action, partial(is_transient, remote=True))
