"""A user's mistake, and how a command line tells it: without a traceback, with an exit status."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator

UNUSABLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
            errno.ELOOP, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of a place that was given


class UserError(ValueError):
    """A mistake that the user can put right. The message says what was wrong, where, and what to do."""

    exit_status = 2


class NonFiniteError(ArithmeticError):
    """A model computed NaN or infinity. The message names the part that did, and what to do."""


def command_line(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorate a command's `main(argv=None)`: it returns the exit status, and what a user can put right is one message.

    `UserError`, a full disk and a place that cannot be had -> "error: ..." on stderr and 2; `NonFiniteError` -> the
    same and 1; Ctrl-C -> one line and 130; a reader that has gone, as of `... | head` -> 141. Anything else is a fault
    of the program and keeps its traceback.
    The caller passes the status on: `sys.exit(main())`, as entry points do.
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
        except BrokenPipeError:  # whoever read our output has had enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at the end
            return 141
        except NonFiniteError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        except Exception as error:
            told = _disk_full(error) or _no_such_output(error)
            if told is not None:
                sys.stderr.write(f"error: {told}\n")
            elif isinstance(error, UserError):
                sys.stderr.write(f"error: {error}\n")
                return error.exit_status
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


def _no_such_output(error: BaseException) -> str | None:
    """The message where a folder or file cannot be there that was asked for."""
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}; give another place"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
