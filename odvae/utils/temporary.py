"""Temporary folders of a process that may be killed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


def _remove_abandoned(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK}"):
        try:
            held = lock(path, "")
        except (UserError, OSError):  # it is in use, or another user's
            continue
        if held is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
            held.release()
