"""Coordinate the processes that build one cache through nothing but the shared folder.

    work/HOST-SPACE-PID-START-TOKEN/   a running process, and its temporary files; touched every few seconds
    work/claims/UNIT                   a symbolic link to the owner of a unit of work
    work/shared/                       results that the running processes share; removed with the last of them

A process of the same host is dead if it no longer exists, one of another host if its folder was not touched for a
minute. Whoever detects that moves the folder away, which only one process can do, and with it the right to write: a
process that was only suspended finds its folder gone. Its claims are void. Two processes that reap one at the same
instant may both take a claim; they write the same bytes under the same name, each in one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import shutil
import socket
import threading
from functools import cache
from pathlib import Path

import psutil
import pyarrow as pa

from ..utils.errors import UserError
from ..utils.files import UNSUPPORTED, sync

HEARTBEAT, DEAD_AFTER = 5.0, 60.0  # s
CLAIMS = "claims"
NAME = re.compile(r".+-\d+-\d+-[0-9a-f]{8}")  # of a process, see `BuildLease.name`


class BuildLease:
    """This process's lease on a folder that several processes work in. A context manager.

    Attributes:
        folder: for files that are being written; on the same file system as the cache.
        shared: for files that are valid only while some process is running.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.name = f"{_host_id()}-{os.getpid()}-{process_start_time(os.getpid())}-{secrets.token_hex(4)}"
        self.folder, self.shared = work / self.name, work / "shared"
        self._stop = threading.Event()
        self._claimed: set[str] = set()

    def __enter__(self) -> BuildLease:
        while True:
            with contextlib.suppress(FileNotFoundError):  # the last process to leave removed the folders
                (self.work / CLAIMS).mkdir(parents=True, exist_ok=True)
                self.folder.mkdir()
                break
        self.reap_dead()
        if not self.live_peers():  # a leftover of a killed build
            shutil.rmtree(self.shared, ignore_errors=True)
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError):
            self.reap_dead()
        for unit in list(self._claimed):
            self.release(unit)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            if not self._folders():
                shutil.rmtree(self.shared, ignore_errors=True)
        for folder in (self.work / CLAIMS, self.work):  # removed by the last process to leave
            with contextlib.suppress(OSError):
                folder.rmdir()

    def claim(self, unit: str) -> bool:
        """Claim a unit of work (a file name), unless a living process has it.

        Raises:
            UserError: the file system has no symbolic links.
        """
        path = self.work / CLAIMS / unit
        for _ in range(3):
            try:
                os.symlink(self.name, path)
            except FileExistsError:
                if not self._clear_if_abandoned(path):
                    return False
                continue
            except FileNotFoundError:  # the last process to leave removed the folder
                path.parent.mkdir(parents=True, exist_ok=True)
                continue
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    raise UserError(f"{self.work} is on a file system without symbolic links ({error.strerror}), which "
                                    "builds need to share their work; put the cache on another file system") from error
                raise
            self._claimed.add(unit)
            return True
        return False

    def release(self, unit: str) -> None:
        self._claimed.discard(unit)
        path = self.work / CLAIMS / unit
        with contextlib.suppress(OSError):
            if os.readlink(path) == self.name:
                path.unlink()

    def live_peers(self) -> list[str]:
        """Return the names of the other processes that are alive."""
        return [path.name for path in self._folders() if path.name != self.name and not self._is_dead(path.name)]

    def write(self, target: Path, data: bytes | memoryview | pa.Buffer) -> None:
        """Write a file atomically, flushed to the disk.

        Raises:
            UserError: other processes took this one for dead.
            OSError: the disk is full or fails; nothing is left.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / secrets.token_hex(4)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync(target.parent)
        except FileNotFoundError as error:
            if self.folder.exists():
                raise
            raise _presumed_dead_error() from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def reap_dead(self) -> None:
        """Remove the folders and claims of dead processes."""
        for path in self._folders():
            if path.name != self.name and self._is_dead(path.name):
                self._reap(path.name)
        with contextlib.suppress(FileNotFoundError):  # the last process to leave removed the folder
            for claim in list((self.work / CLAIMS).iterdir()):
                self._clear_if_abandoned(claim)

    def copy(self, source: Path, target: Path) -> None:
        """Write a copy of a file, as `write` does."""
        with (open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
              memoryview(data) as view):  # released first: an exception's reference to it would keep the map open
            self.write(target, view)

    def _folders(self) -> list[Path]:
        return [path for path in self.work.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]

    def _clear_if_abandoned(self, claim: Path) -> bool:
        """Remove a claim if its owner is dead; returns whether it is gone."""
        try:
            owner = os.readlink(claim)
        except OSError:
            return True  # released meanwhile
        if owner == self.name or not self._is_dead(owner):
            return False
        self._reap(owner)
        away = self.folder / f"claim-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            os.rename(claim, away)
            if os.readlink(away) != owner:  # another process was faster, and has claimed the unit already
                os.rename(away, claim)
        return True

    def _is_dead(self, name: str) -> bool:
        host, pid, start, _ = name.rsplit("-", 3)
        try:
            touched = (self.work / name).stat().st_mtime
        except OSError:
            return True  # its folder is gone
        if host != _host_id():
            return self._now() - touched > DEAD_AFTER
        return process_start_time(int(pid)) != int(start)

    def _reap(self, name: str) -> None:
        with contextlib.suppress(OSError):  # only one process succeeds
            os.rename(self.work / name, self.folder / f"dead-{name}")
            shutil.rmtree(self.folder / f"dead-{name}", ignore_errors=True)

    def _now(self) -> float:
        """Return the time by the clock of the shared file system. Raises UserError: other processes took this one for
        dead."""
        path = self.folder / "now"
        try:
            path.touch()
            return path.stat().st_mtime
        except FileNotFoundError as error:
            raise _presumed_dead_error() from error

    def _touch(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.folder)


def _presumed_dead_error() -> UserError:
    return UserError(f"this build was suspended for more than {DEAD_AFTER:.0f} s, and another process took over its "
                     "work; run the same command again to join it")


def process_start_time(pid: int) -> int | None:
    """Return when a process started, as a number that tells apart processes with the same PID; None if it has ended. A
    zombie has ended."""
    try:
        # On Linux by the kernel's own count, because psutil's time moves with the clock.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.Error:
        return None


@cache
def _host_id() -> str:
    """Return an ID of the PID namespace: the host, its boot, and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
