"""Progress bars and logging of the commands. Both go to stderr: stdout is for results."""

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

from .files import temporary_path

T = TypeVar("T")

PROGRESS_FILE_ENV = "ODVAE_PROGRESS"  # names a file to which every bar writes its progress as JSON, for other programs
PROGRESS_FILE_INTERVAL = 0.2  # s


def bar(total: int | None, title: str, unit: str = "it", **options: Any) -> tqdm:
    """Create a progress bar, for `with bar(...) as progress: progress.update(n)`; `options` go to tqdm (initial,
    disable).

    On a terminal it is drawn in place; in a log file it is a line every 30 seconds at most. If the environment variable
    ODVAE_PROGRESS names a file, that file holds {"title", "unit", "done", "total", "rate", "seconds_left", "postfix"}:
    "rate" in units per second; "total" and "seconds_left" are null if unknown.
    """
    stream = sys.stderr
    if stream.isatty():
        settings: dict[str, Any] = {"file": stream, "dynamic_ncols": True}
    else:
        settings = {"file": _Lines(stream), "mininterval": 30.0, "miniters": 1, "ncols": 100}
    return _Bar(total=total, desc=title, unit=unit, **(settings | options))


def track(iterable: Iterable[T], title: str, unit: str = "it", total: int | None = None) -> Iterator[T]:
    """Yield the items of `iterable`, with a progress bar. `total`: their number, if `iterable` has no `len`."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(total, title, unit) as progress:
        for item in iterable:
            yield item
            progress.update(1)


def setup_logging(level: int = logging.INFO) -> None:
    """Show the project's log on stderr, above any bar. For command lines; a second call only sets the level.

    Library code logs to `logging.getLogger("odvae")` and prints nothing. In a distributed run all processes but the
    first log only warnings.
    """
    first = os.environ.get("RANK", "0") == "0"
    for name in ("odvae", "lvdm", "app"):
        logger = logging.getLogger(name)
        logger.setLevel(level if first else logging.WARNING)
        logger.propagate = False
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            logger.addHandler(_Handler())


def print_result(line: str) -> None:
    """Print a line of a command's result on stdout."""
    sys.stdout.write(line + "\n")


class _Bar(tqdm):
    """A bar that also writes to the progress file; failing to write it does not stop the work."""

    _last_write = -PROGRESS_FILE_INTERVAL  # s, on the monotonic clock

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._write_progress()

    def update(self, n: float | None = 1) -> bool | None:
        displayed: bool | None = super().update(n)
        if time.monotonic() - self._last_write >= PROGRESS_FILE_INTERVAL:
            self._write_progress()
        return displayed

    def close(self) -> None:
        if not self.disable:
            self._write_progress()  # the final state; tqdm may call this twice
        super().close()

    def _write_progress(self) -> None:
        path = os.environ.get(PROGRESS_FILE_ENV)
        if not path or self.disable:
            return
        self._last_write = time.monotonic()
        status = self.format_dict
        rate = status["rate"] or (self.n - self.initial) / max(status["elapsed"], 1e-9) or None
        left = max(0, self.total - self.n) / rate if rate and self.total is not None else None
        progress = {"title": self.desc.removesuffix(": "), "unit": self.unit, "done": self.n, "total": self.total,
                    "rate": rate, "seconds_left": left, "postfix": self.postfix or ""}
        temporary = temporary_path(Path(path))
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(progress), encoding="utf-8")
            os.replace(temporary, path)


class _Handler(logging.Handler):
    """Write above an open bar, to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + self.format(record), file=sys.stderr)
        except Exception:  # as logging does: report a bad record, do not stop the work
            self.handleError(record)


class _Lines:
    """A stream for tqdm that writes lines instead of carriage returns."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()
