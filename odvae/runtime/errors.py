"""A user's mistake, and how a command line tells it: without a traceback, with an exit status."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A mistake that the user can put right. The message says what was wrong, where, and what to do."""


def command_line(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorate a command's `main(argv=None)`: it returns the exit status, and what a user can put right is one message.

    `UserError` and a full disk -> "error: ..." on stderr and 2; Ctrl-C -> one line and 130. Anything else is a fault of
    the program and keeps its traceback. The caller passes the status on: `sys.exit(main())`, as entry points do.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            status = main(argv) or 0
            if distributed := sys.modules.get("odvae.runtime.distributed"):  # not imported for its sake: it takes long
                distributed.leave()
            return status
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            return 130
        except Exception as error:
            full = _disk_full(error)
            if full is not None:
                sys.stderr.write(f"error: {full}\n")
            elif isinstance(error, UserError):
                sys.stderr.write(f"error: {error}\n")
            else:
                raise
            return 2

    return run


def _disk_full(error: BaseException) -> str | None:
    """The message where `error`, or one that it came from, says that the disk is full."""
    for one in _chain(error):
        number = one.errno if isinstance(one, OSError) else None
        # safetensors and torch wrap the system's error into types of their own; only the text tells.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(one):
            name = getattr(one, "filename", None)
            where = f" ({name} could not be written)" if name else ""
            return (f"the disk is full{where}. What was there before is untouched; free some space, or give an output "
                    f"on another disk, and run the same command again")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
