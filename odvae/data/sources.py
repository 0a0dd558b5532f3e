"""References to a source's videos and photos: files, members of WebDataset tars, rows of Parquet files, or anything
that fsspec can open (hf://, s3://, https:// ...). `listing` creates them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from ..utils.backoff import Backoff
from ..utils.files import path_text
from .errors import VideoError
from .failures import is_transient, to_video_error
from .files import is_image
from .parquet import read_cell
from .scratch import Scratch

WHOLE_BYTES = 2**25  # up to which a remote file is read by one request, into memory


@dataclass(frozen=True)
class MediaRef:
    """A reference to the bytes of one video or photo."""

    name: str  # in an index: relative to the source, with / between folders
    path: str  # a local file, or a URL
    version_tag: str  # changes with the bytes: size and time, or a remote system's equivalent; "" if unavailable
    offset: int = 0  # in `path`, of a member of a tar; the row number in a Parquet file
    size: int | None = None  # of a member of a tar; None: all of `path`
    column: str | None = None  # of a Parquet file: the column with the bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", path_text(self.name))  # indices, reports and captions are UTF-8

    def __str__(self) -> str:
        path, inside = path_text(self.path), self.size is not None or self.column is not None
        return f"{path}::{self.name.rpartition('::')[2]}" if inside else path

    @property
    def is_image(self) -> bool:
        """Whether it is a photo or an animated image (`image.is_animated`), by its name."""
        return is_image(Path(self.name))

    @property
    def is_fetched(self) -> bool:
        """Whether `open_local` makes a private copy; else it gives the file itself."""
        return self.size is not None or self.column is not None or is_url(self.path)

    @property
    def known_size(self) -> int | None:
        """The number of its bytes, as far as it is known without reading it."""
        if self.size is not None or self.column is not None:
            return self.size
        with contextlib.suppress(ValueError, LookupError, TypeError):  # the tag has no size
            return int(json.loads(self.version_tag)[0] if is_url(self.path) else self.version_tag.partition(":")[0])
        return None

    @contextlib.contextmanager
    def open_local(self, scratch: Scratch | None = None,
                   on_fetch: Callable[[int], object] = lambda _: None) -> Iterator[Path]:
        """Provide a local file with these bytes. A fetched copy has no name, so that nothing is left of it however the
        process ends; one from a URL stays in `scratch`, if it is given.

        Args:
            on_fetch: called with the number of bytes that were copied.

        Raises:
            VideoError: of a kind of `failures.KINDS`.
        """
        if not self.is_fetched:
            yield Path(self.path)
            return

        def fetch(copy: Any) -> None:
            if missing := self._fetch(copy):
                raise VideoError(f"{self} is truncated: {missing} bytes are missing", "copy or download it again",
                                 "remote" if is_url(self.path) else "truncated")
            copy.flush()
            on_fetch(copy.tell())

        with contextlib.ExitStack() as stack:
            try:
                if scratch is not None and is_url(self.path):
                    key = json.dumps([self.path, self.offset, self.size, self.column, self.version_tag])
                    copy = stack.enter_context(scratch.open(key, fetch))
                    path = Path(f"/proc/self/fd/{copy.fileno()}")
                else:
                    copy, path = stack.enter_context(_unnamed_file(Path(self.name).suffix))
                    fetch(copy)
            except Exception as error:  # each protocol has its own exceptions
                raise to_video_error(error, str(self), remote=is_url(self.path)) from error
            yield path

    def _fetch(self, target: Any) -> int:
        """Copy the bytes; returns how many are missing."""
        if self.column is not None:
            file_tag = self.version_tag.rpartition(":")[0]  # without the row number
            target.write(read_cell(open_path, self.path, file_tag, self.column, self.offset))
            return 0
        is_small = is_url(self.path) and self.size is None and 0 < (self.known_size or 0) <= WHOLE_BYTES
        with io.BytesIO(read_path(self.path)) if is_small else open_path(self.path) as file:
            file.seek(self.offset)
            missing = _copy(file, target, self.size)
        return missing or max(0, (self.known_size or 0) - target.tell())


@dataclass(frozen=True)
class SourceSpan:
    """A file, or a time span of it, with its captions."""

    ref: MediaRef
    start: float  # s
    end: float  # s
    captions: tuple[str, ...]  # at least one; training draws one for each sample
    caption_from_name: bool  # the only caption is the file's name
    captions_unread: bool = False  # there may be other captions, which could not be read


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def local_version_tag(path: Path | str) -> str:
    """Return the version tag of a local file; "" if there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return ""
    return f"{info.st_size}:{info.st_mtime_ns}"


def version_tag_of(path: str, backoff: Backoff) -> str:
    """Return the version tag of a file, local or at a URL; "" if there is none."""
    if not is_url(path):
        return local_version_tag(path)

    def ask() -> str:
        fs, inside = _open_url(path)
        return info_version_tag(fs.info(inside))

    try:
        return backoff.run(ask, partial(is_transient, remote=True))
    except Exception:  # each protocol has its own exceptions; reading the file will report the reason
        return ""


def _open_url(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. To create one takes as long as planning a file."""
    import fsspec

    scheme, _, rest = url.partition("://")
    if "::" in url:  # a file inside another
        fs, inside = fsspec.core.url_to_fs(url)
        return fs, inside
    fs = _filesystem(f"{scheme}://{rest.partition('/')[0]}", os.getpid(), threading.get_ident())
    return fs, fs._strip_protocol(url)


@lru_cache(64)
def _filesystem(root: str, process: int, thread: int) -> Any:
    """Return the file system of a server or bucket, for a thread of a process."""
    import fsspec

    return fsspec.core.url_to_fs(root)[0]


def info_version_tag(info: dict[str, Any]) -> str:
    """Return the version tag of a remote file: the fields of its info that change with its bytes."""
    fields = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created", "updated", "checksum")
    return json.dumps([info.get("size"), *(str(info[name]) for name in fields if info.get(name) is not None)])


@contextlib.contextmanager
def _unnamed_file(suffix: str) -> Iterator[tuple[Any, Path]]:
    """Create a temporary file and yield it with a path to it; on Linux it has no other name, and ends with the
    process."""
    unnamed = os.path.exists("/proc/self/fd")
    try:
        file = tempfile.TemporaryFile() if unnamed else tempfile.NamedTemporaryFile(suffix=suffix)  # noqa: SIM115
    except FileNotFoundError as error:  # tempfile's error if none of its folders is writable
        raise OSError(errno.ENOSPC, "no folder for temporary files has room") from error
    with file:
        yield file, Path(f"/proc/self/fd/{file.fileno()}" if unnamed else file.name)


def open_path(path: str) -> Any:
    """Open a local or remote file for reading bytes at any offset. Raises OSError, ImportError."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def read_path(path: str) -> bytes:
    """Read a local or remote file. Takes one request of an object store, where opening it takes another."""
    if not is_url(path):
        return Path(path).read_bytes()
    import fsspec

    filesystem, inside = fsspec.core.url_to_fs(path)
    data: bytes = filesystem.cat_file(inside)
    return data


def _copy(source: IO[bytes], target: Any, size: int | None) -> int:
    """Copy `size` bytes (None: all); returns how many are missing in the source."""
    if size is None:
        shutil.copyfileobj(source, target, 2**20)
        return 0
    while size > 0 and (part := source.read(min(size, 2**20))):
        target.write(part)
        size -= len(part)
    return size
