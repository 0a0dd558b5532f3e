"""Temporary folders of a process that may be killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .locks import lock

LOCK = ".lock"


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder in the temporary folder (TMPDIR), which is removed at the end; with those of the same prefix
    that killed processes have left."""
    _remove_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        held = lock(Path(folder) / LOCK, "")
        try:
            yield Path(folder)
        finally:
            if held is not None:
                held.release()


@contextmanager
def shared_folder(prefix: str, name: str) -> Iterator[Path]:
    """Yield the folder of a name in the temporary folder, which is created if it is missing; the last process that
    leaves it removes it, or else the next one that uses the prefix. For systems with flock."""
    _remove_abandoned(prefix)
    folder = Path(tempfile.gettempdir()) / f"{prefix}{name}"
    held = _share(folder)
    try:
        yield folder
    finally:
        os.close(held)
        _remove_abandoned(prefix)


def _share(folder: Path) -> int:
    """Create a folder and hold a shared lock in it; returns the lock's file descriptor."""
    import fcntl

    while True:  # until it has not been removed meanwhile
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(held, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), os.stat(folder / LOCK)):
                    return held
            os.close(held)


def _remove_abandoned(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}"):
        try:
            held = lock(path, "")
        except (UserError, OSError):  # it is in use, or another user's
            continue
        if held is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
            held.release()
