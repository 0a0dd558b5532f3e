"""Orders in which training draws clips: pure functions of (seed, group, epoch, position), each clip once an epoch.

The clips of a cache on this machine are shuffled as a whole. Those of one in an object store, or of a very large one,
are drawn shard by shard: the shards are shuffled, and the clips within each window of consecutive shards. So a window's
shards are all that has to be here, and no list of all clips is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..utils.seeding import generator
from .reader import LatentCache

WINDOW = 16  # shards


class ClipOrder(Protocol):
    """Clips in a new order in each epoch."""

    def __len__(self) -> int: ...

    def clip_at(self, seed: int, group: int, epoch: int, i: int) -> int:
        """Return the i-th clip of an epoch."""


class FullShuffle:
    """A list of clips, shuffled as a whole."""

    def __init__(self, clips: np.ndarray) -> None:
        self.clips = clips
        self._current: tuple[tuple[int, int, int], np.ndarray] | None = None  # an epoch and its permutation

    def __len__(self) -> int:
        return len(self.clips)

    def clip_at(self, seed: int, group: int, epoch: int, i: int) -> int:
        key = (seed, group, epoch)
        if self._current is None or self._current[0] != key:
            self._current = key, permutation(len(self.clips), generator(seed, "epoch", group, epoch))
        return int(self.clips[self._current[1][i]])


class WindowShuffle:
    """The clips of some buckets of a cache: shards are shuffled, and clips within windows of `window` shards.

    Args:
        names: of the buckets.
        excluded: clips that are left out, sorted, by their number in the cache.
        first: number of the cache's first clip in the dataset.
    """

    def __init__(self, cache: LatentCache, names: Sequence[str], window: int = WINDOW,
                 excluded: np.ndarray | None = None, first: int = 0) -> None:
        self.window, self._cache, self._first = window, cache, first
        self._wanted = np.isin(cache.bucket_names, list(names))
        self._excluded = np.zeros(0, np.int64) if excluded is None else excluded
        counts = cache.shard_counts[:, self._wanted].sum(1)
        left_out = self._excluded[self._wanted[cache.codes[self._excluded]]]
        counts -= np.bincount(np.searchsorted(cache.first_rows, left_out, "right") - 1, minlength=len(counts))
        self._shards = np.flatnonzero(counts)
        self._counts = counts[self._shards]  # clips of each shard
        self._length = int(self._counts.sum())
        self._epoch: tuple[tuple[int, int, int], np.ndarray, np.ndarray] | None = None  # its shards, ends of windows
        self._windows: dict[tuple[int, int, int, int], np.ndarray] = {}  # the clips of the last two, in order

    def __len__(self) -> int:
        return self._length

    def clip_at(self, seed: int, group: int, epoch: int, i: int) -> int:
        shards, ends = self._order(seed, group, epoch)
        number = int(np.searchsorted(ends, i, "right"))
        key = (seed, group, epoch, number)
        clips = self._windows.get(key)
        if clips is None:
            chosen = shards[number * self.window : (number + 1) * self.window]
            listed = np.concatenate([self._clips_of(shard) for shard in chosen.tolist()])
            clips = listed[permutation(len(listed), generator(seed, "window", group, epoch, number))]
            self._windows = dict(list(self._windows.items())[-1:]) | {key: clips}
        begin = int(ends[number - 1]) if number else 0
        return self._first + int(clips[i - begin])

    def _order(self, seed: int, group: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's shards, and the position at which each window ends."""
        key = (seed, group, epoch)
        if self._epoch is None or self._epoch[0] != key:
            order = permutation(len(self._shards), generator(seed, "shards", group, epoch))
            firsts = np.arange(0, len(order), self.window)
            self._epoch = key, self._shards[order], np.add.reduceat(self._counts[order], firsts).cumsum()
        return self._epoch[1:]

    def _clips_of(self, shard: int) -> np.ndarray:
        begin, end = self._cache.first_rows[shard : shard + 2].tolist()
        clips = begin + np.flatnonzero(self._wanted[self._cache.codes[begin:end]])
        inside = self._excluded[slice(*np.searchsorted(self._excluded, (begin, end)))]
        return clips[~np.isin(clips, inside)] if len(inside) else clips

    @property
    def window_bytes(self) -> int:
        """Bytes of the shards of a window, the largest of the group."""
        sizes = sorted((self._cache.shard_bytes([shard]) for shard in self._shards.tolist()), reverse=True)
        return sum(sizes[: self.window])

    @property
    def clustering(self) -> float:
        """How much more often two clips of a shard are in one batch than in a full shuffle, in which that is once in
        `len(self)` times the batch size; 1: as often."""
        mean = self._length * min(1.0, self.window / max(1, len(self._shards)))  # clips of a window
        return max(1, self._length - 1) / max(1.0, mean - 1)


def as_order(clips: np.ndarray | ClipOrder) -> ClipOrder:
    return FullShuffle(clips) if isinstance(clips, np.ndarray) else clips


def permutation(count: int, rng: torch.Generator) -> np.ndarray:
    """Return a permutation of `count` numbers: 4 bytes each where they fit; the values do not depend on that."""
    dtype = torch.int32 if count < 2**31 else torch.int64
    drawn: np.ndarray = torch.randperm(count, dtype=dtype, generator=rng).numpy()
    return drawn
