"""The entries of a source: media files with their captions, and what is set aside or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from ..utils.backoff import Backoff
from ..utils.files import path_text
from .failures import is_transient
from .files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, name_to_caption, stem_of
from .manifests import ManifestRow
from .sources import MediaRef, SourceSpan, is_url
from .video.reader import VideoError

MEDIA = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS


class Listing(NamedTuple):
    """The content of a source.

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
    """A media file, and where its captions come from: the row, else `read` (None: no captions), the label, the name."""

    row: ManifestRow
    ref: MediaRef
    label: str | None = None
    read: Callable[[], Sequence[str] | None] | None = None


def read_captions(files: Iterable[ListedFile], backoff: Backoff) -> Listing:
    """Read the captions of files. A caption that cannot be read is set aside, but not its file."""
    listing = Listing([], [], Counter())
    for row, ref, label, read in files:
        captions: Sequence[str] | None = row.captions
        unread = False
        try:
            if captions is None and read is not None:
                captions = backoff.run(read, partial(is_transient, remote=is_url(ref.path)))
        except Exception as error:  # each remote protocol has its own exceptions
            reason, advice = (error.reason, error.advice) if isinstance(error, VideoError) else (
                f"the caption of {ref} cannot be read ({error})", "check its permissions")
            fallback = "name" if label is None else "class"
            advice += f"; until then {path_text(ref.name)} is captioned by its {fallback}"
            listing.set_aside.append((ref, VideoError(reason, advice, "caption")))
            unread = True
        from_name = captions is None and label is None
        captions = captions or [name_to_caption(stem_of(PurePosixPath(row.path).name)) if label is None else label]
        listing.entries.append(SourceSpan(ref, row.start, row.end, tuple(captions), from_name, unread))
    return listing


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8 text. Raises VideoError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise VideoError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8",
                         "caption") from error
