"""File locks that are released when their process ends, however it ends."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .files import UNSUPPORTED

logger = logging.getLogger("odvae")


def lock(path: Path, message: str, wait: bool = False) -> FileLock | None:
    """Lock a file until the returned lock is released or dropped, or this process ends. On a file system without locks
    log a warning and return None.

    Raises:
        UserError: another process holds the lock, and `wait` is not set; the message is `message`.
        OSError: the file cannot be opened.
    """
    file_lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        file_lock.acquire(blocking=wait)
    except Timeout as error:
        raise UserError(message) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        logger.warning("%s is on a file system without locks (%s): do not let two processes work there at once",
                       path.parent, error.strerror)
        return None
    return file_lock
