"""A set of hashes in eight bytes each, for sets over a whole cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PENDING = 2**18  # hashes, at least, that are added at once


class HashSet:
    """Holds the first 8 bytes of SHA-256 hashes, given as hex text. Two hashes that begin alike count as one: with 10^8
    of them that is once in 2000 such sets."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._pending: list[np.ndarray] = []
        self._count = 0  # of the pending ones

    def update(self, hashes: Iterable[str]) -> None:
        new = _shorten(hashes)
        self._pending.append(new)
        self._count += len(new)
        if self._count > max(PENDING, len(self._sorted) // 4):
            self._merge()

    def contains(self, hashes: Iterable[str]) -> np.ndarray:
        """Return for each hash whether it is in the set, as a boolean array."""
        self._merge()
        wanted = _shorten(hashes)
        if not len(self._sorted):
            return np.zeros(len(wanted), bool)
        nearest = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        found: np.ndarray = self._sorted[nearest] == wanted
        return found

    def __len__(self) -> int:
        self._merge()
        return len(self._sorted)

    def _merge(self) -> None:
        if self._pending:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._pending]))
            self._pending, self._count = [], 0


def _shorten(hashes: Iterable[str]) -> np.ndarray:
    return np.fromiter((int(text[:16], 16) for text in hashes), np.uint64)
