"""What a source holds: folders, lists, tars in WebDataset's layout, here or at a URL; each file with its captions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import path_text
from .clips import (
    as_text,
    count_left_out,
    count_unnamed,
    is_metadata,
    require_folder,
    stem_of,
    suffix_of,
    walk,
)
from .entries import MEDIA, Found, Listing, captioned, decode_text
from .failures import as_failure
from .lists import Row, is_list, read_rows
from .places import Place, info_stamp, is_url, local_stamp, open_place, stamp_of
from .tars import list_tars
from .video import VideoError


@dataclass(frozen=True)
class _Tree:
    """The files below a folder or a URL, by their names relative to it."""

    root: str
    names: Sequence[str]
    stamps: Mapping[str, str] | None  # None: the files are local
    unreadable: Sequence[tuple[str, OSError]] = ()

    def path(self, name: str) -> str:
        return os.path.join(self.root, name) if self.stamps is None else f"{self.root.rstrip('/')}/{name}"

    def place(self, name: str) -> Place:
        path = self.path(name)
        return Place(path_text(name), path, local_stamp(Path(path)) if self.stamps is None else self.stamps[name])

    def read(self, name: str) -> bytes:
        with open_place(self.path(name)) as file:
            data: bytes = file.read()
            return data


def list_entries(source: Path | str, columns: Sequence[str] = ()) -> Listing:
    """List what a source holds.

    Args:
        source: a folder with the folders below it (its photos too), a list (.jsonl, .csv, .parquet), a tar or a folder
            of tars in WebDataset's layout, a folder of Parquet files; each of them here, or at a URL. A folder with
            metadata.csv, .jsonl or .parquet holds what these name.
        columns: of lists, as `lists.parse_columns` takes them.

    Raises:
        UserError: there is no such thing, or nothing in it; a list that cannot be read.
    """
    text = str(source)
    if text.endswith(".tar"):
        return list_tars([text], text.rpartition("/")[0])
    if not is_url(text) and is_list(Path(text)):
        return _lists([text], str(Path(text).parent), columns)
    if is_url(text):
        if is_list(PurePosixPath(text)):
            return _lists([text], text.rpartition("/")[0], columns)
        tree = _remote_tree(text)
    else:
        require_folder(text)
        found = walk(text)
        tree = _Tree(text, found.names, None, found.unreadable)
    listing = _tree_entries(tree, columns)
    for name, error in tree.unreadable:
        listing.set_aside.append((Place(path_text(name) or ".", tree.path(name), ""), VideoError(
            f"{tree.path(name)} cannot be read ({error.strerror or error})", "see that it is there and who may read it",
            as_failure(error, name).kind)))
    return listing


def _tree_entries(tree: _Tree, columns: Sequence[str]) -> Listing:
    tars = [name for name in tree.names if name.endswith(".tar")]
    if tars:
        found = list_tars([tree.path(name) for name in tars], tree.root)
        return found._replace(left_out=found.left_out + count_left_out(tree.names, tars))
    lists = [name for name in tree.names if is_metadata(name)]
    media = [name for name in tree.names if suffix_of(name) in MEDIA]
    if not lists and not media:
        lists = [name for name in tree.names if suffix_of(name) == ".parquet"]
    if lists:
        found = _lists([tree.path(name) for name in lists], tree.root, columns, tree.stamps)
        named = (entry.place.name for entry in found.entries)
        return found._replace(left_out=count_unnamed((name for name in tree.names if name not in lists), named))
    if not media:
        raise UserError(f"{tree.root} holds no videos or photos ({len(tree.names)} other files in it); looked for "
                        f"{' '.join(MEDIA)}")
    return _media(tree, media)


def _media(tree: _Tree, media: Sequence[str]) -> Listing:
    """A folder's files. The labels, where it has a folder for each class: all files lie in folders directly below it,
    and these are several. Their names, with _ and - as spaces, are the labels."""
    texts = {stem_of(name): name for name in reversed(tree.names) if suffix_of(name) == ".txt"}
    above = {name.rpartition("/")[0] for name in media}
    classes = len(above) > 1 and all(folder and "/" not in folder for folder in above)

    def caption(text: str) -> list[str]:
        return [decode_text(tree.read(text), tree.path(text))]

    found = []
    for name in media:
        label = as_text(name.rpartition("/")[0]) if classes else None
        text = texts.get(stem_of(name))
        found.append(Found(Row(name), tree.place(name), label, None if text is None else partial(caption, text)))
    return captioned(found)._replace(left_out=count_left_out(tree.names, media))


def _lists(lists: Sequence[str], root: str, columns: Sequence[str], stamps: Mapping[str, str] | None = None) -> Listing:
    """The rows of lists. A relative path in one begins at the list's own folder or URL."""
    found: list[Found] = []
    for path in lists:
        base, stamp = path.rpartition("/")[0] or ".", stamp_of(path)
        for row in _rows_of(path, columns):
            if row.cell is not None:
                name = f"{_below(path, root)}::{row.path or f'row-{row.cell[1]}'}"
                place = Place(path_text(name), path, f"{stamp}:{row.cell[1]}", row.cell[1], None, row.cell[0])
                found.append(Found(replace(row, path=row.path or name), place))
                continue
            file = row.path if is_url(row.path) or row.path.startswith("/") else f"{base}/{row.path}"
            if is_url(file):
                known = (stamps or {}).get(_below(file, root))
                place = Place(row.path if is_url(row.path) else _below(file, root), file, known or stamp_of(file))
                found.append(Found(row, place))
            else:
                place = Place(path_text(Path(os.path.relpath(file, root)).as_posix()), file, local_stamp(Path(file)))
                found.append(Found(row, place, None, None if row.captions else _beside(Path(file))))
    return captioned(found)


def _rows_of(path: str, columns: Sequence[str]) -> list[Row]:
    if not is_url(path):
        return read_rows(path, columns)
    try:
        with open_place(path) as file:
            return read_rows(path, columns, file)
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


def _remote_tree(url: str) -> _Tree:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    except Exception as error:  # each protocol has exceptions of its own
        raise UserError(f"cannot reach {url}: {error}. Check the address, the network, and that fsspec has what this "
                        "protocol needs") from error
    stamps = {os.path.relpath(name, path): info_stamp(info) for name, info in sorted(found.items())}
    names = [name for name in stamps if not any(part.startswith(".") for part in name.split("/"))]
    return _Tree(fs.unstrip_protocol(path), sorted(names, key=lambda name: name.split("/")), stamps)
