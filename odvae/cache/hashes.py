"""Sets and maps of hashes that take 8 and 12 bytes each, for those of a whole cache. Only the first 64 bits count: that
two of 100 million hashes agree in these has a probability of 0.03 %."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

PENDING = 2**18  # hashes, at least, that are added at once
HEX = 32  # digits of a `format.caption_hash`
BINS = 256  # of a map, at most; by a key's first byte
Bin = tuple[np.ndarray, np.ndarray]  # keys in order, and their numbers


def hash_keys(hashes: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Return the first 64 bits of caption hashes (hex) as uint64."""
    fixed = hashes.cast(pa.binary(HEX))
    fixed = fixed.combine_chunks() if isinstance(fixed, pa.ChunkedArray) else fixed
    raw = np.frombuffer(fixed.buffers()[1] or b"", np.uint8, len(fixed) * HEX, fixed.offset * HEX)
    digits = raw.reshape(-1, HEX)[:, :16]
    digits = np.where(digits >= ord("a"), digits - (ord("a") - 10), digits - ord("0")).astype(np.uint8)
    pairs = np.ascontiguousarray(digits[:, ::2] << 4 | digits[:, 1::2])
    keys: np.ndarray = pairs.view(">u8").ravel().astype(np.uint64)
    return keys


class HashSet:
    """A set of SHA-256 hashes, given as hex text."""

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


class SortedBins(ABC):
    """Maps keys (`hash_keys`) to numbers: sorted keys with their numbers, in a power of two of bins by a key's first
    bits."""

    num_bins: int

    @abstractmethod
    def bin(self, k: int) -> Bin: ...

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of each key; -1: it is not in the map."""
        numbers = np.full(len(keys), -1, np.int32)
        bin_of = _bins_of(keys, self.num_bins)
        for k in np.unique(bin_of).tolist():
            known, numbers_here = self.bin(k)
            if len(known):
                chosen = np.flatnonzero(bin_of == k)
                wanted = keys[chosen]
                nearest = np.searchsorted(known, wanted).clip(max=len(known) - 1)
                numbers[chosen] = np.where(known[nearest] == wanted, numbers_here[nearest], -1)
        return numbers

    def rebinned(self, k: int, count: int) -> Bin:
        """Return what bin `k` of `count` would be, if there were so many."""
        if count <= self.num_bins:
            share = self.num_bins // count
            return _merge([self.bin(mine) for mine in range(k * share, (k + 1) * share)])
        keys, numbers = self.bin(k * self.num_bins // count)
        chosen = _bins_of(keys, count) == k
        return keys[chosen], numbers[chosen]


class HashMap(SortedBins):
    """A map in memory. It is sorted bin by bin, so that building it takes little more memory than it does itself.

    Args:
        groups: the keys of number 0, of number 1 and so on.
    """

    num_bins = BINS

    def __init__(self, groups: Iterable[np.ndarray]) -> None:
        bins: list[list[Bin]] = [[] for _ in range(BINS)]
        pending, count = list[Bin](), 0
        for number, keys in enumerate(groups):
            pending.append((keys, np.full(len(keys), number, np.int32)))
            count += len(keys)
            if count >= 4 * PENDING:
                _distribute(pending, bins)
                pending, count = [], 0
        _distribute(pending, bins)
        self._bins = list[Bin]()
        while bins:
            self._bins.append(_merge(bins.pop(0)))

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._bins)

    def bin(self, k: int) -> Bin:
        return self._bins[k]


def _bins_of(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the bin of each key, of a power of two of at most 256 bins."""
    first: np.ndarray = (keys >> np.uint64(56)).astype(np.uint8) // np.uint16(BINS // count)
    return first


def _distribute(chunks: list[Bin], bins: list[list[Bin]]) -> None:
    """Append keys and numbers to the bins that they belong to."""
    keys, numbers = _merge(chunks)
    firsts = np.arange(1, BINS, dtype=np.uint64) << np.uint64(56)
    for some, *chunk in zip(bins, *(np.split(values, np.searchsorted(keys, firsts)) for values in (keys, numbers)),
                            strict=True):
        if len(chunk[0]):
            some.append((chunk[0].copy(), chunk[1].copy()))  # a view would keep all of them


def _merge(chunks: list[Bin]) -> Bin:
    """Return keys and numbers sorted by key."""
    keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in chunks)])
    numbers = np.concatenate([np.zeros(0, np.int32), *(numbers for _, numbers in chunks)])
    order = np.argsort(keys, kind="stable")
    return keys[order], numbers[order]


def _shorten(hashes: Iterable[str]) -> np.ndarray:
    return np.fromiter((int(text[:16], 16) for text in hashes), np.uint64)
