"""A bounded cache of remote files on this machine's disk, shared by the processes of a host.

A file is locked as long as a process uses it, by a lock of the operating system that ends with the process: shared by
its readers, exclusive for who downloads or removes it. A download has another name until it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..utils.backoff import Backoff
from ..utils.errors import UserError, is_disk_full
from ..utils.files import sync
from ..utils.storage import PATIENCE, RANGE_BYTES, Storage

FOLDER, SIZE = "ODVAE_SHARD_CACHE", "ODVAE_SHARD_CACHE_GB"  # environment variables
DEFAULT_BYTES = 100e9  # at most; and half of what the disk has for it
POLL = 0.02  # s between two attempts to lock a file
PART = ".part"  # ends the name of a download that is not complete

logger = logging.getLogger("odvae")


class CachedFile:
    """A file of the cache, which is not removed before it is closed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        self.close()


class ShardCache:
    """Files of object stores in a folder.

    Args:
        limit: bytes of all files; the least recently used are removed for new ones. Files in use are never removed, so
            if these alone are more, the limit is exceeded with a warning.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.users = 0  # latent caches of this process
        self._backoff = Backoff(PATIENCE)
        self._warned = False

    def fetch(self, storage: Storage, name: str, size: int) -> CachedFile:
        """Return a file of `size` bytes of an object store, downloaded if it is not here. If another process or thread
        downloads it, wait for that.

        Raises:
            UserError: it is missing or of another size in the store; the disk is full and stays so.
            OSError: the store or the disk fails.
        """
        path = self._path(storage, name, size)
        while (held := _hold(path)) is None:
            self._download(storage, name, size, path)
        return held

    def _path(self, storage: Storage, name: str, size: int) -> Path:
        key = hashlib.sha256(f"{storage.root}/{name}:{size}".encode()).hexdigest()[:16]
        return self.folder / f"{key}-{name.rpartition('/')[2]}"

    def _download(self, storage: Storage, name: str, size: int, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PART)
        with _exclusive(part, unless=path) as file:
            if file is None:  # another process has downloaded it
                return
            try:
                self._backoff.run(lambda: self._fill(storage, name, size, file), is_disk_full)
                sync(part)
                os.replace(part, path)
            except BaseException as error:
                part.unlink(missing_ok=True)
                if is_disk_full(error):
                    raise UserError(f"the disk of the shard cache is full ({self.folder}); free some space there, or "
                                    f"set {FOLDER} to a folder on another disk") from error
                raise

    def _fill(self, storage: Storage, name: str, size: int, file: IO[bytes]) -> None:
        self._reserve(file, size)
        done = 0
        try:
            with storage.open(name, size) as source:
                while done < size and (data := source.read(min(RANGE_BYTES, size - done))):
                    done += file.write(data)
            file.flush()
        except FileNotFoundError as error:
            raise UserError(f"{storage.path(name)} was removed while the cache was open; start again") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._remove(size)  # other files are on this disk too
            raise
        if done != size:
            raise UserError(f"{storage.path(name)} is damaged: it was truncated or changed; restore it, or run `odvae "
                            f"cache verify {storage.root} --repair` and build again: only its clips are re-encoded")

    def _reserve(self, file: IO[bytes], size: int) -> None:
        """Give a download its size already, so that other processes count it, after making room for it."""
        with _exclusive(self.folder / ".lock"):
            file.seek(0)
            file.truncate(0)
            missing = self.used() + size - self.limit
            if missing > 0 and self._remove(missing) < missing and not self._warned:
                self._warned = True
                logger.warning("the shards in use take more than the %.3g GB of the shard cache %s; set %s to more, or "
                               "use smaller windows of shards", self.limit / 1e9, self.folder, SIZE)
            file.truncate(size)

    def _remove(self, size: float) -> float:
        """Remove the least recently used files, of at least `size` bytes if so many are not in use; returns how
        many."""
        removed = 0.0
        for _, bytes_, path in sorted(self._files()):
            if removed >= size:
                break
            removed += bytes_ if _remove_unused(path) else 0
        return removed

    def used(self) -> int:
        """Return the bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """The time of the last use, size and path of each file."""
        found = []
        for path in self.folder.glob("[!.]*"):
            try:
                info = path.stat()
            except FileNotFoundError:
                continue
            found.append((info.st_mtime_ns, info.st_size, path))
        return found


def shard_cache() -> ShardCache:
    """Return the cache that the environment configures. Raises UserError."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "odvae" / "shards"
    return _configured(Path(os.environ.get(FOLDER) or default).expanduser(), os.environ.get(SIZE) or "")


@functools.lru_cache
def _configured(folder: Path, size: str) -> ShardCache:
    if not size:
        folder.mkdir(parents=True, exist_ok=True)
        cache = ShardCache(folder, 0)
        return ShardCache(folder, min(DEFAULT_BYTES, (shutil.disk_usage(folder).free + cache.used()) / 2))
    try:
        limit = float(size) * 1e9
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{SIZE}={size}: give a size in GB, above 0")
    return ShardCache(folder, limit)


def _hold(path: Path) -> CachedFile | None:
    """Lock a complete file against its removal, and count this as its last use; None if there is none."""
    while True:
        try:
            file = open(path, "rb")  # noqa: SIM115, closed with the `CachedFile`
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            os.utime(path)
            return CachedFile(path, file)
        file.close()  # removed before it was locked


@contextmanager
def _exclusive(path: Path, unless: Path | None = None) -> Iterator[IO[bytes] | None]:
    """Create a file, or open one that a killed process has left, and hold it alone. None once `unless` exists.

    This tries again and again rather than waits for the lock: who holds it may rename the file to `unless`, and from
    then on its readers have it locked.
    """
    while True:
        if unless is not None and unless.exists():
            yield None
            return
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL)
                continue
            if not _is_at(file, path):  # who held it has renamed or removed it
                continue
            if unless is not None and unless.exists():  # since it was looked for: this file is a new one
                path.unlink()
                yield None
                return
            yield file
            return


def _remove_unused(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()
                return True
    except (BlockingIOError, FileNotFoundError):
        pass
    return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
