"""Work in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def map_ahead(pool: Executor, function: Callable[[S], T], items: Iterable[S], depth: int) -> Iterator[T]:
    """Yield the results for items in order, of which at most `depth` are begun before they are asked for: as
    `Executor.map`, which begins all at once and holds all results."""
    remaining = iter(items)
    ahead = deque(pool.submit(function, item) for item in islice(remaining, depth))
    while ahead:
        result = ahead.popleft().result()
        ahead.extend(pool.submit(function, item) for item in islice(remaining, 1))
        yield result
