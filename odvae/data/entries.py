"""The entries of a source: media files with their captions, and what is set aside or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..utils.backoff import Backoff
from ..utils.files import path_text
from .failures import is_transient
from .files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, name_to_caption, stem_of
from .sources import MediaRef, SourceSpan, is_url, read_path, version_tag_of
from .spill import Record
from .video.reader import VideoError

MEDIA = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
THREADS = 32  # that wait for the answers of disks and servers
CHUNK = 64  # files that a thread takes at once


class Listing(NamedTuple):
    """The content of a source, or of a partition of it.

    Attributes:
        entries: in order.
        set_aside: files without an entry, and (of kind "caption") files whose caption cannot be read: they have an
            entry, captioned by their class or name.
        left_out: files that are not read, counted by extension.
    """

    entries: list[SourceSpan]
    set_aside: list[tuple[MediaRef, VideoError]]
    left_out: Counter[str]


class ListedFile(NamedTuple):
    """A media file, and where its captions come from: the record, else a file of text, the label, the title."""

    record: Record  # with a path
    label: str | None = None
    text: str | None = None  # path or URL
    look_beside: bool = False  # for a .txt, if there is no `text`


def read_entries(files: Iterable[ListedFile], backoff: Backoff) -> Listing:
    """Read the version tags and captions of files, many at a time. A caption that cannot be read is set aside, but not
    its file."""
    listing = Listing([], [], Counter())

    def read_some(some: Iterable[ListedFile]) -> list[tuple[SourceSpan, VideoError | None]]:
        return [_read_entry(file, backoff) for file in some]

    chunks = _chunk(files)
    if not chunks:
        return listing
    with ThreadPoolExecutor(min(THREADS, len(chunks))) as pool:
        for results in pool.map(read_some, chunks):
            for entry, error in results:
                listing.entries.append(entry)
                if error is not None:
                    listing.set_aside.append((entry.ref, error))
    return listing


def _chunk(files: Iterable[ListedFile]) -> list[list[ListedFile]]:
    """Split files among threads: those that wait for a network in small numbers."""
    files = list(files)
    size = 4 if any(file.record.path and is_url(file.record.path) for file in files[:1]) else CHUNK
    return [files[i : i + size] for i in range(0, len(files), size)]


def _read_entry(file: ListedFile, backoff: Backoff) -> tuple[SourceSpan, VideoError | None]:
    record, label = file.record, file.label
    assert record.path is not None
    tag = version_tag_of(record.path, backoff) if record.version_tag is None else record.version_tag
    ref = MediaRef(record.name, record.path, tag, record.offset, record.size, record.column)
    captions, error = record.captions, None if record.caption_error is None else VideoError(*record.caption_error)
    text = file.text or (_beside(record.path) if file.look_beside and captions is None else None)
    if captions is None and error is None and text is not None:
        try:
            captions = (backoff.run(partial(_read_text, text), partial(is_transient, remote=is_url(text))),)
        except Exception as failure:  # each remote protocol has its own exceptions
            error = caption_error(failure, str(ref))
    if error is not None:
        fallback = "name" if label is None else "class"
        error = VideoError(error.reason, f"{error.advice}; until then {path_text(ref.name)} is captioned by its "
                           f"{fallback}", "caption")
    from_name = captions is None and label is None
    if not captions:
        title = record.path if record.title is None else record.title
        captions = (name_to_caption(stem_of(PurePosixPath(title).name)) if label is None else label,)
    return SourceSpan(ref, record.start, record.end, captions, from_name, error is not None), error


def caption_error(error: Exception, name: str) -> VideoError:
    """Return the error for a caption of the file `name` that cannot be read."""
    reason, advice = (error.reason, error.advice) if isinstance(error, VideoError) else (
        f"the caption of {name} cannot be read ({error})", "check its permissions")
    return VideoError(reason, advice, "caption")


def _beside(path: str) -> str | None:
    """Return the path of the .txt beside a local file; None if there is none."""
    for suffix in (".txt", ".TXT", ".Txt"):
        text = Path(path).with_suffix(suffix)
        if text.is_file():
            return str(text)
    return None


def _read_text(path: str) -> str:
    return decode_text(read_path(path), path)


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8 text. Raises VideoError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise VideoError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8",
                         "caption") from error
