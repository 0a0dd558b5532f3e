"""The entries of a source: places, each with its captions, and what is set aside or left out on the way there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from ..utils.backoff import Backoff
from ..utils.files import path_text
from .failures import may_pass
from .files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, as_text, stem_of
from .manifests import ManifestRow
from .sources import MediaRef, SourceSpan, is_url
from .video.reader import VideoError

MEDIA = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS


class Listing(NamedTuple):
    """What a source holds.

    Attributes:
        entries: in order.
        set_aside: places without an entry, and (of kind "caption") those whose caption cannot be read: they have an
            entry, with their class or name for a caption.
        left_out: files that are not read, counted by ending.
    """

    entries: list[SourceSpan]
    set_aside: list[tuple[MediaRef, VideoError]]
    left_out: Counter[str]


class Found(NamedTuple):
    """A place, and where its captions come from: the row, `read` (None: there are none), the label, the name."""

    row: ManifestRow
    place: MediaRef
    label: str | None = None
    read: Callable[[], Sequence[str] | None] | None = None


def captioned(found: Iterable[Found], backoff: Backoff) -> Listing:
    """Entries with their captions. Captions that cannot be read are set aside, and not their file."""
    listing = Listing([], [], Counter())
    for row, place, label, read in found:
        captions: Sequence[str] | None = row.captions
        unread = False
        try:
            if captions is None and read is not None:
                captions = backoff.run(read, partial(may_pass, remote=is_url(place.path)))
        except Exception as error:  # a remote file's: each protocol has exceptions of its own
            reason, advice = (error.reason, error.advice) if isinstance(error, VideoError) else (
                f"the caption of {place} cannot be read ({error})", "see who may read it")
            other = "name" if label is None else "class"
            advice += f"; until then {path_text(place.name)} has its {other} for a caption"
            listing.set_aside.append((place, VideoError(reason, advice, "caption")))
            unread = True
        from_name = captions is None and label is None
        captions = captions or [as_text(stem_of(PurePosixPath(row.path).name)) if label is None else label]
        listing.entries.append(SourceSpan(place, row.start, row.end, tuple(captions), from_name, unread))
    return listing


def decode_text(data: bytes, name: str) -> str:
    """Raises VideoError where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise VideoError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8",
                         "caption") from error
