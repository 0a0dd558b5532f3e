"""Where a source's videos and photos lie: files, members of WebDataset tars, rows of Parquet files, or anything that
fsspec reaches (hf://, s3://, https:// ...). A place knows its name, a stamp that changes with its bytes, and gives them
as a local file. (`listing` finds them.)"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..utils.files import path_text
from .errors import VideoError
from .failures import to_video_error
from .files import is_image
from .parquet import read_cell


@dataclass(frozen=True)
class MediaRef:
    """The bytes of one video or photo."""

    name: str  # as an index tells it: relative to the source, with / between folders
    path: str  # a local file, or a URL
    version_tag: (
        str  # changes with the bytes: size and time, or what a remote system has for it; "" where neither can be had
    )
    offset: int = 0  # in `path`, of a member of a tar; the row's number in a Parquet file
    size: int | None = None  # of a member of a tar; None: all of `path`
    column: str | None = None  # of a Parquet file: the bytes lie in this column

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", path_text(self.name))  # an index, a report and a caption are UTF-8

    def __str__(self) -> str:
        path, inside = path_text(self.path), self.size is not None or self.column is not None
        return f"{path}::{self.name.rpartition('::')[2]}" if inside else path

    @property
    def is_image(self) -> bool:
        """By its name: a photo, or a picture that moves (`image.is_animated`)."""
        return is_image(Path(self.name))

    @property
    def is_fetched(self) -> bool:
        """`open_local` makes a copy, which nobody changes; else it is the file itself."""
        return self.size is not None or self.column is not None or is_url(self.path)

    @contextlib.contextmanager
    def open_local(self) -> Iterator[Path]:
        """A local file with these bytes; what had to be fetched has no name, so that nothing is left of it however the
        process ends. Raises VideoError, of a kind of `failures.KINDS`."""
        if not self.is_fetched:
            yield Path(self.path)
            return
        with contextlib.ExitStack() as stack:
            try:
                copy, path = stack.enter_context(_without_name(Path(self.name).suffix))
                missing = self._fetch(copy)
                copy.flush()
            except Exception as error:  # each protocol has exceptions of its own
                raise to_video_error(error, str(self), remote=is_url(self.path)) from error
            if missing:
                raise VideoError(f"{self} breaks off: {missing} bytes are missing", "copy or download it again",
                                 "remote" if is_url(self.path) else "truncated")
            yield path

    def _fetch(self, target: Any) -> int:
        """Copy the bytes; returns how many are missing."""
        if self.column is not None:
            file_tag = self.version_tag.rpartition(":")[0]  # without the row's number
            target.write(read_cell(open_path, self.path, file_tag, self.column, self.offset))
            return 0
        with open_path(self.path) as file:
            file.seek(self.offset)
            return _copy(file, target, self.size)


@dataclass(frozen=True)
class SourceSpan:
    """A place, or a span of it, with its caption."""

    ref: MediaRef
    start: float  # s
    end: float  # s
    captions: tuple[str, ...]  # one at least; a training draws one for each sample
    caption_from_name: bool  # there was no other
    captions_unread: bool = False  # there may be others, which could not be read now


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def local_version_tag(path: Path) -> str:
    """"" where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"


def version_tag_of(path: str) -> str:
    """"" where there is no such file."""
    if not is_url(path):
        return local_version_tag(Path(path))
    import fsspec

    try:
        fs, inside = fsspec.core.url_to_fs(path)
        return info_version_tag(fs.info(inside))
    except Exception:  # each protocol has exceptions of its own; why it cannot be had, reading it will say
        return ""


def info_version_tag(info: dict[str, Any]) -> str:
    """What a remote system says of a file that changes with its bytes."""
    known = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created", "updated", "checksum")
    return json.dumps([info.get("size"), *(str(info[name]) for name in known if info.get(name) is not None)])


@contextlib.contextmanager
def _without_name(suffix: str) -> Iterator[tuple[Any, Path]]:
    """A temporary file and a path to it; on Linux it has no other name, and ends with the process."""
    unnamed = os.path.exists("/proc/self/fd")
    try:
        file = tempfile.TemporaryFile() if unnamed else tempfile.NamedTemporaryFile(suffix=suffix)  # noqa: SIM115
    except FileNotFoundError as error:  # what tempfile says where none of its folders can be written to
        raise OSError(errno.ENOSPC, "no folder for temporary files has room") from error
    with file:
        yield file, Path(f"/proc/self/fd/{file.fileno()}" if unnamed else file.name)


def open_path(path: str) -> Any:
    """A file here or at a URL, open for reading bytes at any offset. Raises OSError, ImportError."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def _copy(source: IO[bytes], target: Any, size: int | None) -> int:
    """How many of `size` bytes (None: whatever there is) are missing in the source."""
    if size is None:
        shutil.copyfileobj(source, target, 2**20)
        return 0
    while size > 0 and (part := source.read(min(size, 2**20))):
        target.write(part)
        size -= len(part)
    return size
