"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from .errors import UserError
from .files import UNSUPPORTED

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("odvae")


def lock(path: Path, taken: str, wait: bool = False) -> int | None:
    """Hold a lock file for as long as this process lives, or until the handle that is returned is closed. None where
    there are no locks, of which a warning tells but on Windows.

    Raises:
        UserError: another process holds it, and `wait` is not set; the message is `taken`.
        OSError: the file cannot be opened.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise UserError(taken) from error
        logger.warning("%s lies on a file system without locks (%s): nothing keeps two processes from working there at "
                       "once", path.parent, error.strerror)
        return None
    return handle
