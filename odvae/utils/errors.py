"""A user's mistake, and how a command line tells it: without a traceback, with an exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can put right. The message says what was wrong, where, and what to do."""

    exit_status = 2


class NonFiniteError(ArithmeticError):
    """A model computed NaN or infinity. The message names the part that did, and what to do."""


class OutputError(UserError, argparse.ArgumentTypeError):
    """An output that cannot be written to; argparse shows the message of this one as it is."""


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: C:/ is a drive. `Path` makes one / of two


def output_path(path: str | Path) -> Path:
    """The path of a file or folder to write. For argparse's `type`, for configs and for whatever writes.

    Raises:
        OutputError: it is a URL, which nothing here writes to: it would become a local folder of that name.
    """
    if URL.match(str(path)):
        raise OutputError(f"cannot write to {path}: an output must lie on this machine's file system. Give a local "
                          "path and copy the result there")
    return Path(path)


def cli_main(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorate a command's `main(argv=None)`: it returns the exit status, and what a user can put right is one message.

    `UserError`, and what the system says of a file, such as a full disk or a missing permission -> "error: ..." on
    stderr and 2, or the error's own exit status; `NonFiniteError` -> the same and 1; Ctrl-C -> one line and 130; a
    reader that has gone, as of `... | head` -> 141. Anything else is a fault of the program and keeps its traceback.
    The caller passes the status on: `sys.exit(main())`, as entry points do.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _make_writable()
        try:
            status = main(argv) or 0
            if distributed := sys.modules.get("odvae.trainer.distributed"):  # not imported for its sake: it takes long
                distributed.leave()
            _flush_stdout()
            return status
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            return 130
        except BrokenPipeError:  # whoever read our output has had enough of it
            _discard_stdout()
            return 141
        except NonFiniteError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        except Exception as error:
            message = user_message(error)
            if message is None:
                raise
            sys.stderr.write(f"error: {message}\n")
            return error.exit_status if isinstance(error, UserError) else 2

    return run


def _make_writable() -> None:
    """Let stdout and stderr take any text: what their encoding lacks is written as escapes, and where one is closed,
    what is written to it goes nowhere. (Its descriptor must be taken: a file opened later would get it, and with it
    whatever a library prints.)"""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115, to the end
            if name == "stdout" and sys.stderr is not None:
                sys.stderr.write("warning: stdout is closed, so the results are not shown\n")
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_stdout() -> None:
    """Write what is left of the results. Python would do so at the end, and its failure would be a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise UserError(f"the results could not be written to stdout ({error.strerror})") from error


def _discard_stdout() -> None:
    """Python flushes it at the end, which would fail once more."""
    with contextlib.suppress(OSError, ValueError):  # no file: a test's, or a notebook's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def user_message(error: BaseException) -> str | None:
    """What a user can put right, as one message; None for a fault of the program."""
    return _disk_full(error) or _file_error(error) or (str(error) if isinstance(error, UserError) else None)


def is_disk_full(error: BaseException) -> bool:
    """Does `error`, or one that it came from, say that the disk is full?"""
    return _disk_full(error) is not None


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


def _file_error(error: BaseException) -> str | None:
    """The message where the system refused a file or folder that was asked for."""
    if not isinstance(error, OSError) or not error.filename or isinstance(error, UserError):
        return None
    name = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename)
    advice = _ADVICE.get(error.errno or 0, "give another place")
    return f"{name}: {(error.strerror or 'cannot be used').lower()}; {advice}"


_ADVICE = {errno.EACCES: "give another place, or get the permission", errno.EPERM: "give another place, or get the "
           "permission", errno.EROFS: "give a place that can be written to", errno.ENOENT: "give one that is there",
           errno.ENAMETOOLONG: "give a shorter name", errno.EIO: "see whether the disk is sound",
           **dict.fromkeys((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP), "give a place on another file system")}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
