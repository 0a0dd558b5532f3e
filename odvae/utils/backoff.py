"""Retries with exponential backoff, and a bound on all the waiting of one run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
FIRST, LONGEST = 1.0, 60.0  # s before the second attempt; each wait is twice the one before, up to the longest
RECOVERY = 20.0  # s without a failure that give a second of patience back

logger = logging.getLogger(__name__)


class Backoff:
    """Retry actions whose failures are transient. Shared by the threads of one run.

    An outage holds every thread up, and all of them continue when it ends. What counts against `patience` is the time
    during which at least one action was being retried. All of it is given back when a retried action succeeds, and a
    twentieth of the time in which none was retried. So files that never heal cost a run `patience` seconds and a
    twentieth of its time at most, not so much each; and hours after an outage that was too long the next one is waited
    for again. (That other actions succeed gives nothing back: beside each broken file there are good ones.)

    Args:
        patience: s; no retry is begun once they are used up. 0: no retries.
        clock: s, monotonic.
        wait: sleep so many seconds; True ends all retries.
    """

    def __init__(self, patience: float, *, clock: Callable[[], float] = time.monotonic,
                 wait: Callable[[float], bool] | None = None) -> None:
        self.patience = patience
        self._clock = clock
        self._cancelled = threading.Event()
        self._wait = wait or self._cancelled.wait
        self._lock = threading.Lock()
        self._spent = 0.0  # of the patience,
        self._counted = clock()  # up to this time
        self._retried = self._waiting = 0  # actions

    def run(self, action: Callable[[], T], is_transient: Callable[[Exception], bool]) -> T:
        """The action's result, or its last exception."""
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            failure = error
        delay = FIRST
        with self._retrying():
            while self._pause(failure, delay):
                delay = min(LONGEST, 2 * delay)
                try:
                    result = action()
                except Exception as error:
                    if not is_transient(error):
                        raise
                    failure = error
                else:
                    self._count(healed=True)
                    return result
        raise failure

    def cancel(self) -> None:
        """End all waits; whatever fails from now on is not retried."""
        self._cancelled.set()

    @contextmanager
    def _retrying(self) -> Iterator[None]:
        self._count(more=1)
        try:
            yield
        finally:
            self._count(more=-1)

    def _count(self, more: int = 0, healed: bool = False) -> None:
        """Count the time since the last call; from now on so many `more` actions are being retried."""
        with self._lock:
            now = self._clock()
            passed, self._counted = now - self._counted, now
            self._spent = self._spent + passed if self._retried else max(0.0, self._spent - passed / RECOVERY)
            self._retried += more
            if healed:
                self._spent = 0.0

    def _pause(self, error: Exception, delay: float) -> bool:
        """False where there is to be no retry."""
        self._count()
        with self._lock:
            if self._spent >= self.patience or self._cancelled.is_set():
                return False
            first, self._waiting = self._waiting == 0, self._waiting + 1
        if first:  # of the threads that an outage holds up one tells it
            logger.warning("%s; retrying in %.0f s", error, delay)
        try:
            return not self._wait(delay)
        finally:
            with self._lock:
                self._waiting -= 1
