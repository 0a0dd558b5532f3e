"""The locks of builds: one process changes a cache, or each of n processes every n-th of its partitions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ..utils.locks import lock
from ..utils.storage import LocalStorage, Storage
from . import format as fmt

NAME = re.compile(r"part-(\d+)-of-(\d+)\.lock")


@contextmanager
def lock_cache(storage: Storage, part: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Hold a cache, or the i-th of n parts of it, for this process. It is released when the process ends, however that
    happens. Object stores have no locks: two builds there write the same bytes.

    Raises:
        UserError: another process holds the cache, or the same part of it, or a part of another number of parts.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    folder = storage.folder / fmt.WORK
    message = f"another process is changing {storage.root}; wait for it, or stop it"
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_if_empty, folder)
        own = folder / f"part-{part[0]}-of-{part[1]}.lock"
        _hold(own, message, stack)
        for path in sorted(folder.glob("part-*.lock")):
            match = NAME.fullmatch(path.name)
            if match and int(match[2]) != part[1]:
                with ExitStack() as trial:
                    _hold(path, message, trial)
        if part[1] == 1:  # nothing else writes here
            storage.remove_temporaries()
        yield


def _hold(path: Path, message: str, stack: ExitStack) -> None:
    held: FileLock | None = lock(path, message)

    def release() -> None:
        path.unlink(missing_ok=True)
        if held is not None:
            held.release()

    stack.callback(release)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


