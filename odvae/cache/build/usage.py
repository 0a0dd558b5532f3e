"""What a build has spent: seconds of its stages, bytes, requests. Counted by several threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Usage:
    """Figures by name: `probe_seconds`, `decode_seconds`, `fetch_seconds` (of decoding processes), `encode_seconds` (of
    encoders); `read_bytes`, `fetched_bytes`, `written_bytes`; `fetches`, `retries`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures: Counter[str] = Counter()

    def add(self, figures: Mapping[str, float]) -> None:
        with self._lock:
            for name, value in figures.items():
                self._figures[name] += value  # type: ignore[assignment]  # seconds are floats

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add({name: time.monotonic() - begin})

    def figures(self) -> dict[str, float]:
        with self._lock:
            return dict(self._figures)

    def take(self) -> dict[str, float]:
        """Return the figures, and count from 0 again."""
        with self._lock:
            figures, self._figures = self._figures, Counter()
            return dict(figures)
