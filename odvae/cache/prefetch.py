"""Fetch the shards of a training's next steps in threads, for caches in object stores."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable

from .dataset import LatentDataset

STEPS = 64  # ahead
THREADS = 4


class ShardPrefetcher:
    """Fetches shards ahead of the step.

    Args:
        clips_of: returns the clips of a step, by their index in `dataset`.
        steps: how many are looked ahead.
    """

    def __init__(self, dataset: LatentDataset, clips_of: Callable[[int], Iterable[int]], steps: int = STEPS) -> None:
        self._dataset, self._clips_of, self._steps = dataset, clips_of, steps
        self._queue: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._waiting = set[tuple[int, int]]()
        self._done = range(0)  # steps whose shards were requested
        self._threads: list[threading.Thread] = []

    def advance(self, step: int) -> None:
        """Request the shards of the steps after `step`."""
        begin = self._done.stop if self._done.start <= step < self._done.stop else step + 1
        end = step + 1 + self._steps
        for later in range(begin, end):
            for shard in sorted(self._dataset.shards(self._clips_of(later)) - self._waiting):
                self._waiting.add(shard)
                self._queue.put(shard)
        self._done = range(step, end)
        while not self._queue.empty() and len(self._threads) < THREADS:
            thread = threading.Thread(target=self._fetch, name="fetch shards", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _fetch(self) -> None:
        while True:
            cache, shard = self._queue.get()
            # Whoever reads the shard meets the same error, and reports it.
            with contextlib.suppress(Exception):
                self._dataset.caches[cache].load(shard)
            self._waiting.discard((cache, shard))
