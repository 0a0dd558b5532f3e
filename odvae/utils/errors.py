"""User errors, and how command lines report them: by a message and an exit status, without a traceback."""

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
    """An error that the user can fix. The message says what is wrong, where, and what to do."""

    exit_status = 2


class NonFiniteError(ArithmeticError):
    """A model computed NaN or infinity. The message names the part, and what to do."""


class OutputError(UserError, argparse.ArgumentTypeError):
    """An output that cannot be written to; argparse shows this error's message unchanged."""


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # at least two letters: C:/ is a drive. `Path` turns // into /


def path_or_url(path: str | Path) -> Path | str:
    """Return a path, or a URL as it is: `Path` would turn // into /. For argparse's `type`."""
    return str(path) if URL.match(str(path)) and not isinstance(path, Path) else Path(path)


def output_path(path: str | Path) -> Path:
    """Check the path of a file or folder to write. For argparse's `type`, configs and writers.

    Raises:
        OutputError: it is a URL; nothing here writes to URLs, so it would become a local folder of that name.
    """
    if URL.match(str(path)):
        raise OutputError(f"cannot write to {path}: an output must lie on this machine's file system. Give a local "
                          "path and copy the result there")
    return Path(path)


def cli_main(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorate a command's `main(argv=None)`, so that it returns the exit status and reports user errors.

    `UserError`, and system errors with a file, such as a full disk or a missing permission -> "error: ..." on stderr
    and 2, or the error's own exit status; `NonFiniteError` -> the same and 1; Ctrl-C -> one line and 130; a closed
    pipe, as in `... | head` -> 141. Anything else is a bug and keeps its traceback. The caller passes the status on:
    `sys.exit(main())`, as entry points do.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _make_writable()
        try:
            status = main(argv) or 0
            if distributed := sys.modules.get("odvae.trainer.distributed"):  # importing it just for this takes long
                distributed.shutdown()
            _flush_stdout()
            return status
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            return 130
        except BrokenPipeError:  # the reader of our output has closed the pipe
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
    """Let stdout and stderr take any text: characters that their encoding lacks are escaped, and a closed stream is
    redirected to /dev/null. (Its descriptor must be occupied: a file opened later would get it, and with it whatever
    a library prints.)"""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115, until exit
            if name == "stdout" and sys.stderr is not None:
                sys.stderr.write("warning: stdout is closed, so the results are not shown\n")
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_stdout() -> None:
    """Flush the results. Python would do so at exit, and report a failure by a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise UserError(f"the results could not be written to stdout ({error.strerror})") from error


def _discard_stdout() -> None:
    """Redirect stdout to /dev/null: Python flushes it at exit, which would fail again."""
    with contextlib.suppress(OSError, ValueError):  # not a file, as in a test or a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def user_message(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix; None for a bug."""
    return _disk_full(error) or _file_error(error) or (str(error) if isinstance(error, UserError) else None)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, says that the disk is full."""
    return _disk_full(error) is not None


def _disk_full(error: BaseException) -> str | None:
    """Return the message if `error`, or one of its causes, says that the disk is full."""
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        # safetensors and torch wrap the system's error in their own types; only the text remains.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            name = getattr(cause, "filename", None)
            where = f" ({name} could not be written)" if name else ""
            return (f"the disk is full{where}. Existing files are unchanged; free some space, or choose an output on "
                    f"another disk, and run the same command again")
    return None


def _file_error(error: BaseException) -> str | None:
    """Return the message if the system refused access to a file or folder."""
    if not isinstance(error, OSError) or not error.filename or isinstance(error, UserError):
        return None
    name = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename)
    advice = _ADVICE.get(error.errno or 0, "choose another path")
    return f"{name}: {(error.strerror or 'cannot be used').lower()}; {advice}"


_ADVICE = {**dict.fromkeys((errno.EACCES, errno.EPERM), "choose another path, or get the permission"),
           errno.EROFS: "choose a writable path", errno.ENOENT: "choose a path that exists",
           errno.ENAMETOOLONG: "choose a shorter name", errno.EIO: "check the disk",
           **dict.fromkeys((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP), "choose a path on another file system")}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
