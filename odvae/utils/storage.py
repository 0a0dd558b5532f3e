"""A folder of files, on this machine or at a URL of fsspec: read, list and delete files, and write them atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from .backoff import Backoff
from .errors import URL, UserError
from .files import atomic_path, remove_temporaries
from .remote import RangeReader, is_failed_condition, is_transient

Buffer = bytes | memoryview
T = TypeVar("T")
PATIENCE = 600.0  # s for which transient failures of an object store are retried
RANGE_BYTES = 2**23  # of one request, when a file is copied to this machine


class ChangedMeanwhileError(Exception):
    """A conditional write: the file has been changed by another process."""


class Storage(ABC):
    """Files by name, with / between folders. What the file system raises is passed on as OSError."""

    root: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, name: str, size: int | None = None) -> IO[bytes]:
        """Open a file for reading at any offset; only what is read is transferred. `size` in bytes, if it is known,
        saves a request. Raises FileNotFoundError."""

    @abstractmethod
    def write(self, name: str, data: Buffer) -> None:
        """Write a file atomically: readers see all of it, or what was there before."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each file directly in a folder, by its name in it, without hidden ones. {} if
        there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, in order; [] if there is no such folder."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its files, if it exists."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def inside(self, folder: str) -> Storage:
        """Return a folder in this one."""

    def path(self, name: str) -> str:
        """Return a file's path or URL."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


class LocalStorage(Storage):
    """A folder of this machine's file system."""

    def __init__(self, root: Path | str) -> None:
        self.folder, self.root = Path(root), str(root)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str, size: int | None = None) -> IO[bytes]:
        return open(self.folder / name, "rb")

    def write(self, name: str, data: Buffer) -> None:
        with atomic_path(self.folder / name) as temporary, open(temporary, "wb") as file:
            file.write(data)

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries
                        if not entry.name.startswith(".") and entry.is_file()}
        except FileNotFoundError:
            return {}

    def folders(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def inside(self, folder: str) -> LocalStorage:
        return LocalStorage(self.folder / folder)

    def remove_temporaries(self) -> None:
        """Remove what killed processes have left; only while no other process writes."""
        remove_temporaries(self.folder)


class RemoteStorage(Storage):
    """A folder at a URL of fsspec. A file is written by one PUT, or a multipart upload, which object stores do
    atomically. Transient failures are retried with backoff.

    It can be pickled, and used in a forked process. `root` is the URL without a user name and password.
    """

    def __init__(self, url: str) -> None:
        self.root, self._url = re.sub(r"://[^/@]*@", "://", url), url
        self._connect()

    def _connect(self) -> None:
        import fsspec

        try:
            self._filesystem, self._folder = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot use {self.root}: {error}. Check the address, and install what fsspec needs for "
                            "this protocol") from error
        self._process = os.getpid()
        self._backoff = Backoff(PATIENCE)

    def __getstate__(self) -> str:
        return self._url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)  # type: ignore[misc]

    def _run(self, action: Callable[[Any], T]) -> T:
        """Run an action on the file system, and again while its failures are transient."""
        if self._process != os.getpid():  # forked: the threads of an asynchronous file system are not here
            self._connect()
        return self._backoff.run(lambda: action(self._filesystem), is_transient)

    def read(self, name: str) -> bytes:
        data: bytes = self._run(lambda fs: fs.cat_file(self._name(name)))
        return data

    def open(self, name: str, size: int | None = None) -> IO[bytes]:
        path = self._name(name)
        size = self._run(lambda fs: fs.info(path)["size"]) if size is None else size
        reader: Any = RangeReader(
            lambda first, end: self._run(lambda fs: fs.cat_file(path, start=first, end=end)), size)
        return reader  # type: ignore[no-any-return]

    def write(self, name: str, data: Buffer) -> None:
        self._put(name, data, {})

    def version(self, name: str) -> str | None:
        """Return a file's ETag, "" if the store has none, None if there is no such file."""
        try:
            info = self._run(lambda fs: fs.info(self._name(name)))
        except FileNotFoundError:
            return None
        return str(info.get("ETag") or "")

    def write_if(self, name: str, data: Buffer, version: str | None) -> None:
        """Write a file, provided that `version` still is what it was. A new file is conditional in the stores that
        have fsspec's mode "create"; the replacement of one in S3, and unconditional elsewhere.

        Raises:
            ChangedMeanwhileError: it is not. Also if a write whose response was lost has been repeated.
        """
        is_s3 = "s3" in self._filesystem.protocol
        condition = {"mode": "create"} if version is None else {"IfMatch": version} if version and is_s3 else {}
        try:
            self._put(name, data, condition)
        except FileExistsError as error:
            raise ChangedMeanwhileError(self.path(name)) from error
        except OSError as error:
            if not is_failed_condition(error):
                raise
            raise ChangedMeanwhileError(self.path(name)) from error

    def _put(self, name: str, data: Buffer, condition: dict[str, str]) -> None:
        path = self._name(name)

        def put(fs: Any) -> None:
            with contextlib.suppress(FileExistsError, NotImplementedError, PermissionError):
                if "s3" not in fs.protocol:  # which has no folders: a folder's name alone would be a bucket to create
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, bytes(data), **condition)

        try:
            self._run(put)
        except NotImplementedError as error:
            raise OSError(errno.EROFS, "files of this protocol cannot be written", self.path(name)) from error

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._list(folder).items() if info["type"] != "directory"}

    def folders(self, folder: str) -> list[str]:
        return sorted(name for name, info in self._list(folder).items() if info["type"] == "directory")

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._run(lambda fs: fs.rm(self._name(name), recursive=True))

    def exists(self, name: str) -> bool:
        found: bool = self._run(lambda fs: fs.exists(self._name(name)))
        return found

    def inside(self, folder: str) -> RemoteStorage:
        return RemoteStorage(f"{self._url.rstrip('/')}/{folder}")

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        path = self._name(folder)
        try:
            entries = self._run(lambda fs: fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        named = {info["name"].rstrip("/").rpartition("/")[2]: info for info in entries
                 if info["name"].rstrip("/") != path.rstrip("/")}
        return {name: info for name, info in named.items() if name and not name.startswith(".")}

    def _name(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}" if name else self._folder


def open_storage(root: Storage | Path | str) -> Storage:
    """Return the storage of a folder: a path, or a URL of fsspec such as s3://bucket/folder.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    if isinstance(root, Storage):
        return root
    return RemoteStorage(str(root)) if URL.match(str(root)) else LocalStorage(root)
