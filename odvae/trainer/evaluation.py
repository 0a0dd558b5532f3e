"""Evaluations in a training: spread over the processes, and within a budget of time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from .distributed import gather, is_main_process, num_processes, process_index

logger = logging.getLogger("odvae")

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class EvaluationBudget:
    """How much of each kind the evaluations of a run compute, so that one takes `minutes`; None: everything.

    The first evaluation settles it by what its first items take; later ones, also of a resumed run, compute the same
    items, so that all figures of a run compare.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes, self._limits = minutes, dict[str, int]()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        return {"minutes": self.minutes, "limits": self._limits}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned; with other minutes the next evaluation settles anew."""
        if state["minutes"] == self.minutes:
            self._limits = dict(state["limits"])

    def limit(self, kind: str, count: int) -> int | None:
        """Return how many of `count` are evaluated; None: not settled yet."""
        return count if self.minutes is None else self._limits.get(f"{count} {kind}")

    def settle(self, kind: str, count: int, seconds: float, turns: Callable[[int], int], part: float) -> int:
        """Settle how many of `count` are evaluated, at least what takes as long as one: all processes work.

        Args:
            seconds: that an item takes.
            turns: items that a process evaluates one after another for so many of `count`.
            part: of the budget.
        """
        assert self.minutes is not None
        most = 60 * self.minutes * part
        limit = next((n for n in range(count, 1, -1) if turns(n) * seconds <= max(most, turns(1) * seconds)), 1)
        self._limits[f"{count} {kind}"] = limit
        if limit < count and is_main_process():
            logger.warning("evaluating %d of %d %s in this run: all take about %.1f minutes, over the %.1f that "
                           "loop.evaluation_minutes leaves them", limit, count, kind, turns(count) * seconds / 60,
                           most / 60)
        return limit


class EvaluationGroup:
    """The processes that evaluate together: each takes its share of the items, and all get the results of all.

    Args:
        join: called by a process that has finished its share, before it waits for the others.
        together: consecutive processes that evaluate the same items, with context parallelism.
        budget: None: everything is evaluated.
    """

    def __init__(self, join: Callable[[], None] = lambda: None, together: int = 1,
                 budget: EvaluationBudget | None = None) -> None:
        self._join, self._together, self._budget = join, together, budget or EvaluationBudget()

    @property
    def _replicas(self) -> int:
        return num_processes() // self._together

    def share(self, count: int) -> range:
        """Return the indices, of `count` items, that this process evaluates."""
        return range(process_index() // self._together, count, self._replicas)

    def gather(self, results: Mapping[int, T]) -> list[T]:
        """Return the results of all processes in the order of their indices. All must call it."""
        self._join()
        every = {index: result for part in gather(dict(results)) for index, result in part.items()}
        return [every[index] for index in sorted(every)]

    def evaluate(self, kind: str, count: int, run: Callable[[list[K]], Sequence[T]],
                 items: Callable[[int], Sequence[K]], part: float = 1.0) -> dict[K, T]:
        """Evaluate as many of `count` as the budget allows; return the results by item. All processes must call it.

        Args:
            kind: what is counted, in the plural, for messages.
            run: evaluates some items; its results are on the CPU, so that it can be timed.
            items: returns those to evaluate for so many of `count`, costly ones first.
            part: of the budget.
        """
        done: dict[K, T] = {}
        limit = self._budget.limit(kind, count)
        if limit is None:
            seconds = self._measure(list(items(count)), run, done)
            limit = self._budget.settle(kind, count, seconds, lambda n: -(-len(items(n)) // self._replicas), part)
        chosen = list(items(limit))
        mine = self.share(len(chosen))
        missing = [chosen[i] for i in mine if chosen[i] not in done]
        if missing:
            done |= zip(missing, run(missing), strict=True)
        return dict(zip(chosen, self.gather({i: done[chosen[i]] for i in mine}), strict=True))

    def _measure(self, items: list[K], run: Callable[[list[K]], Sequence[T]], done: dict[K, T]) -> float:
        """Evaluate this process's first two items into `done`; return the seconds of the second, as the first warms up,
        in the slowest process."""
        seconds = 0.0
        for i in self.share(len(items))[:2]:
            start = time.perf_counter()
            done[items[i]], = run([items[i]])
            seconds = time.perf_counter() - start
        self._join()
        return max(gather(seconds))


def evenly(number: int, count: int) -> list[int]:
    """Return `number` indices of `count`, evenly spaced, beginning with 0."""
    return [i * count // number for i in range(number)]
