"""Processes that build one cache together, with nothing between them but the folder that they share.

    work/HOST-SPACE-PID-START-TOKEN/   a process at work, and its half-written files; touched every few seconds
    work/claims/UNIT                   a link that says whose a unit of work is
    work/shared/                       what one process tells the others; gone with the last of them

A process is dead when its host says so, or, of another host, when its folder was not touched for a minute. The folder
is then moved away, which only one can do, and with it ends its right to write: a process that was only asleep finds its
folder gone. Its claims hold no more. Two processes that bury one at the same instant may both take a claim; they would
write the same bytes under the same name, each in one rename.
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

TOUCH, DEAD_AFTER = 5.0, 60.0  # s
CLAIMS = "claims"
NAME = re.compile(r".+-\d+-\d+-[0-9a-f]{8}")  # of a process, see `BuildLease.name`


class BuildLease:
    """This process, among those at work in a folder. A context manager.

    Attributes:
        folder: for files that are being written; on the same file system as the cache.
        shared: for what holds only as long as some process is at work.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.name = f"{_host()}-{os.getpid()}-{started(os.getpid())}-{secrets.token_hex(4)}"
        self.folder, self.shared = work / self.name, work / "shared"
        self._stop = threading.Event()
        self._claimed: set[str] = set()

    def __enter__(self) -> BuildLease:
        while True:
            with contextlib.suppress(FileNotFoundError):  # the last one out took the folders along
                (self.work / CLAIMS).mkdir(parents=True, exist_ok=True)
                self.folder.mkdir()
                break
        self.reap_dead()
        if not self.live_peers():  # of a build that was killed
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
        for folder in (self.work / CLAIMS, self.work):  # the last one out
            with contextlib.suppress(OSError):
                folder.rmdir()

    def claim(self, unit: str) -> bool:
        """Take a unit of work (a file name), unless a living process has it.

        Raises:
            UserError: the file system has no symbolic links.
        """
        path = self.work / CLAIMS / unit
        for _ in range(3):
            try:
                os.symlink(self.name, path)
            except FileExistsError:
                if not self._abandoned(path):
                    return False
                continue
            except FileNotFoundError:  # the last one out took the folder along
                path.parent.mkdir(parents=True, exist_ok=True)
                continue
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    raise UserError(f"{self.work} lies on a file system without symbolic links ({error.strerror}), by "
                                    "which the processes of a build share the work; put the cache on another file "
                                    "system") from error
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
        """The other processes that are alive."""
        return [path.name for path in self._folders() if path.name != self.name and not self._dead(path.name)]

    def write(self, target: Path, data: bytes | memoryview | pa.Buffer) -> None:
        """Write a file whole or not at all, flushed to the disk.

        Raises:
            UserError: this process was taken for dead.
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
            raise _taken_for_dead() from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def reap_dead(self) -> None:
        """Remove what processes left that are no more."""
        for path in self._folders():
            if path.name != self.name and self._dead(path.name):
                self._reap(path.name)
        with contextlib.suppress(FileNotFoundError):  # the last one out took the folder along
            for claim in list((self.work / CLAIMS).iterdir()):
                self._abandoned(claim)

    def copy(self, source: Path, target: Path) -> None:
        """As `write`, from a file."""
        with (open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
              memoryview(data) as view):  # which an exception would hold on to, and the map could not be closed
            self.write(target, view)

    def _folders(self) -> list[Path]:
        return [path for path in self.work.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]

    def _abandoned(self, claim: Path) -> bool:
        """True where a claim's owner is dead or gone, and the claim now too."""
        try:
            owner = os.readlink(claim)
        except OSError:
            return True  # released meanwhile
        if owner == self.name or not self._dead(owner):
            return False
        self._reap(owner)
        away = self.folder / f"claim-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            os.rename(claim, away)
            if os.readlink(away) != owner:  # another was faster, and has taken the unit already
                os.rename(away, claim)
        return True

    def _dead(self, name: str) -> bool:
        host, pid, start, _ = name.rsplit("-", 3)
        try:
            touched = (self.work / name).stat().st_mtime
        except OSError:
            return True  # its folder is gone
        if host != _host():
            return self._now() - touched > DEAD_AFTER
        return started(int(pid)) != int(start)

    def _reap(self, name: str) -> None:
        with contextlib.suppress(OSError):  # only one can
            os.rename(self.work / name, self.folder / f"dead-{name}")
            shutil.rmtree(self.folder / f"dead-{name}", ignore_errors=True)

    def _now(self) -> float:
        """By the clock of the file system, which all share. Raises UserError: this process was taken for dead."""
        path = self.folder / "now"
        try:
            path.touch()
            return path.stat().st_mtime
        except FileNotFoundError as error:
            raise _taken_for_dead() from error

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH):
            with contextlib.suppress(OSError):
                os.utime(self.folder)


def _taken_for_dead() -> UserError:
    return UserError(f"this build stood still for more than {DEAD_AFTER:.0f} s, and another process took its work "
                     "over; run the same command again to help it")


def started(pid: int) -> int | None:
    """When a process began, as a number that no other process of its number has; None: it is no more. One that was
    killed and waits for its parent to notice is no more."""
    try:
        # By the kernel's own count on Linux: psutil's time moves with the clock.
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
def _host() -> str:
    """Where process numbers mean the same: a host since its last start, and on it a container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
