"""Fetched files on local disk, so that each is fetched once for all processes that read it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from ..utils.temporary import shared_folder

PREFIX = "odvae-scratch-"
PART = ".part"  # of a file that is being fetched, or that was interrupted


@dataclass(frozen=True)
class Scratch:
    """A folder of fetched files for several processes of this machine. The least recently used are removed.

    Attributes:
        limit: bytes; the files that are being fetched come on top.
    """

    folder: str
    limit: int

    @property
    def name(self) -> str:
        """By which other processes open it, or one of theirs on another machine."""
        return os.path.basename(self.folder).removeprefix(PREFIX)

    def open(self, key: str, fetch: Callable[[IO[bytes]], None]) -> IO[bytes]:
        """Return the open file of a key, which `fetch` writes unless it is there. A file counts once it is complete: of
        a fetch that fails or is killed nothing is used. Removal leaves open files readable."""
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest())
        if (file := _open_if_there(path)) is not None:
            return file
        with open(path + PART, "ab") as part, _locked(part):
            if (file := _open_if_there(path)) is not None:  # another process has fetched it meanwhile
                return file
            try:
                _write(part, fetch)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._make_room(0)  # others use the disk too
                _write(part, fetch)
            file = open(path + PART, "rb")  # noqa: SIM115, for the caller
            os.rename(path + PART, path)
        self._make_room(self.limit)
        return file

    def _make_room(self, limit: int) -> None:
        """Remove the least recently used files above a limit in bytes."""
        with os.scandir(self.folder) as entries:
            found = [(info.st_mtime, info.st_size, entry.path) for entry in entries
                     if not entry.name.startswith(".") and not entry.name.endswith(PART)
                     and (info := _stat(entry)) is not None]
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


@contextmanager
def open_scratch(gigabytes: float, name: str | None = None) -> Iterator[Scratch | None]:
    """Yield a scratch in the temporary folder, with at most four fifths of the free space; None for 0 GB, and on a
    system where open files cannot be removed or have no name. The last process that has it open removes it.

    Args:
        name: shared by the processes that give it; None: a new one.
    """
    if not gigabytes or not os.path.exists("/proc/self/fd"):
        yield None
        return
    with shared_folder(PREFIX, name or uuid.uuid4().hex) as folder:
        yield Scratch(str(folder), round(min(gigabytes * 1e9, .8 * shutil.disk_usage(folder).free)))


def _write(part: IO[bytes], fetch: Callable[[IO[bytes]], None]) -> None:
    """Write a file that may hold what an interrupted fetch has left."""
    part.seek(0)
    part.truncate(0)
    fetch(part)
    part.flush()


def _open_if_there(path: str) -> IO[bytes] | None:
    try:
        file = open(path, "rb")  # noqa: SIM115, for the caller
        os.utime(path)
    except FileNotFoundError:
        return None
    return file


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Hold a file for this process; the lock ends with the process."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat()
    return None
