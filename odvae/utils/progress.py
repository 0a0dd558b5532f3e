"""Bars with elapsed time and time left, and the log lines of a command. Both on stderr: stdout is for results."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from .files import temporary_beside

T = TypeVar("T")

PROGRESS_FILE_ENV = (
    "ODVAE_PROGRESS"  # names a file in which every bar tells, as JSON, how far it is: for whoever runs the command
)
PROGRESS_FILE_INTERVAL = 0.2  # seconds


def bar(total: int | None, title: str, unit: str = "it", **options: Any) -> tqdm:
    """A progress bar, for `with bar(...) as progress: progress.update(n)`; `options` go to tqdm (initial, disable).

    On a terminal it is drawn in place; in a log file it is a line every 30 seconds at most. Where the environment's
    ODVAE_PROGRESS names a file, that one always holds {"title", "unit", "done", "total", "rate", "seconds_left",
    "postfix"}: `rate` in units a second, "total" and what follows from it null where they are not known.
    """
    stream = sys.stderr
    if stream.isatty():
        settings: dict[str, Any] = {"file": stream, "dynamic_ncols": True}
    else:
        settings = {"file": _Lines(stream), "mininterval": 30.0, "miniters": 1, "ncols": 100}
    return _Bar(total=total, desc=title, unit=unit, **(settings | options))


def track(iterable: Iterable[T], title: str, unit: str = "it", total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, with a bar. `total`: how many there are, where `len` does not tell."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(total, title, unit) as progress:
        for item in iterable:
            yield item
            progress.update(1)


def setup_logging(level: int = logging.INFO) -> None:
    """Show the project's log on stderr, below any bar. For command lines; a second call only sets the level.

    Library code logs to `logging.getLogger("odvae")` and prints nothing. Of several processes only the first one tells
    what is not a warning.
    """
    first = os.environ.get("RANK", "0") == "0"
    for name in ("odvae", "lvdm", "app"):
        logger = logging.getLogger(name)
        logger.setLevel(level if first else logging.WARNING)
        logger.propagate = False
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            logger.addHandler(_Handler())


def print_result(line: str) -> None:
    """A line of a command's result, on stdout."""
    sys.stdout.write(line + "\n")


class _Bar(tqdm):
    """Also written to the file that the environment names; that it cannot be written is no reason to stop the work."""

    _told = -PROGRESS_FILE_INTERVAL  # when, on the monotonic clock

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._tell()

    def update(self, n: float | None = 1) -> bool | None:
        shown: bool | None = super().update(n)
        if time.monotonic() - self._told >= PROGRESS_FILE_INTERVAL:
            self._tell()
        return shown

    def close(self) -> None:
        if not self.disable:
            self._tell()  # the last word; a second one does no harm
        super().close()

    def _tell(self) -> None:
        path = os.environ.get(PROGRESS_FILE_ENV)
        if not path or self.disable:
            return
        self._told = time.monotonic()
        now = self.format_dict
        rate = now["rate"] or (self.n - self.initial) / max(now["elapsed"], 1e-9) or None
        left = max(0, self.total - self.n) / rate if rate and self.total is not None else None
        line = {"title": self.desc.removesuffix(": "), "unit": self.unit, "done": self.n, "total": self.total,
                "rate": rate, "seconds_left": left, "postfix": self.postfix or ""}
        temporary = temporary_beside(Path(path))
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(line), encoding="utf-8")
            os.replace(temporary, path)


class _Handler(logging.Handler):
    """Writes past an open bar, to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + self.format(record), file=sys.stderr)
        except Exception:  # logging's own rule: report a bad record, do not stop the work
            self.handleError(record)


class _Lines:
    """A stream for tqdm that is no terminal: a line each time instead of a carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
