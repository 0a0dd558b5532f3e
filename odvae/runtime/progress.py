"""Bars with elapsed time and time left, and the log lines of a command. Both on stderr: stdout is for results."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(total: int | None, title: str, unit: str = "it", **options: Any) -> tqdm:
    """A progress bar, for `with bar(...) as progress: progress.update(n)`; `options` go to tqdm (initial, disable).

    On a terminal it is drawn in place; in a log file it is a line every 30 seconds at most.
    """
    stream = sys.stderr
    if stream.isatty():
        settings: dict[str, Any] = {"file": stream, "dynamic_ncols": True}
    else:
        settings = {"file": _Lines(stream), "mininterval": 30.0, "miniters": 1, "ncols": 100}
    return tqdm(total=total, desc=title, unit=unit, **(settings | options))


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


def tell(line: str) -> None:
    """A line of a command's result, on stdout."""
    sys.stdout.write(line + "\n")


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
