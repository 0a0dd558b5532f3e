"""A folder of files, on this machine or at a URL of fsspec: read, list and delete files, and write them atomically."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any

from .errors import URL, UserError
from .files import atomic_path, remove_temporaries

Buffer = bytes | memoryview


class Storage(ABC):
    """Files by name, with / between folders. What the file system raises is passed on as OSError."""

    root: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any offset. Raises FileNotFoundError."""

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

    def path(self, name: str) -> str:
        """Return a file's path or URL."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


class LocalStorage(Storage):
    """A folder of this machine's file system."""

    def __init__(self, root: Path | str) -> None:
        self.folder, self.root = Path(root), str(root)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def open(self, name: str) -> IO[bytes]:
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

    def remove_temporaries(self) -> None:
        """Remove what killed processes have left; only while no other process writes."""
        remove_temporaries(self.folder)


class RemoteStorage(Storage):
    """A folder at a URL of fsspec. A file is written by one PUT, which object stores do atomically."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.root = url
        try:
            self._fs, self._folder = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot use {url}: {error}. Check the address, and install what fsspec needs for this "
                            "protocol") from error

    def read(self, name: str) -> bytes:
        data: bytes = self._fs.cat_file(self._name(name))
        return data

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self.read(name))

    def write(self, name: str, data: Buffer) -> None:
        with contextlib.suppress(FileExistsError, NotImplementedError):  # object stores have no folders
            self._fs.makedirs(self._name(name).rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(self._name(name), bytes(data))

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: info["size"] for name, info in self._list(folder).items() if info["type"] != "directory"}

    def folders(self, folder: str) -> list[str]:
        return sorted(name for name, info in self._list(folder).items() if info["type"] == "directory")

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._name(name), recursive=True)

    def exists(self, name: str) -> bool:
        found: bool = self._fs.exists(self._name(name))
        return found

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        path = self._name(folder)
        try:
            entries = self._fs.ls(path, detail=True)
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
