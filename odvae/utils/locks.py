"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .files import UNSUPPORTED

logger = logging.getLogger("odvae")


def lock(path: Path, taken: str, wait: bool = False) -> FileLock | None:
    """Hold a lock file until what is returned is released, or dropped, or this process ends. None on a file system
    without locks, of which a warning tells.

    Raises:
        UserError: another process holds it, and `wait` is not set; the message is `taken`.
        OSError: the file cannot be opened.
    """
    held = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire(blocking=wait)
    except Timeout as error:
        raise UserError(taken) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        logger.warning("%s lies on a file system without locks (%s): nothing keeps two processes from working there at "
                       "once", path.parent, error.strerror)
        return None
    return held
