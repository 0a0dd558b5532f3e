"""Retries with exponential backoff, and a bound on all the waiting of one run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
FIRST, LONGEST = 1.0, 60.0  # s before the second attempt; each wait is twice the one before, up to the longest

logger = logging.getLogger(__name__)


class Backoff:
    """Retry actions whose failures are transient. Shared by the threads of one run.

    An outage holds every thread up, and all of them continue when it ends. What counts against `patience` is the time
    during which at least one action was failing; it is given back when a retried action succeeds. So files that never
    heal cost a run `patience` seconds in all, not that much each.

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
        self._spent = 0.0
        self._charged = -float("inf")  # up to this time on the clock
        self._waiting = 0

    def run(self, action: Callable[[], T], is_transient: Callable[[Exception], bool]) -> T:
        """The action's result, or its last exception."""
        delay, failed = FIRST, None
        while True:
            try:
                result = action()
            except Exception as error:
                failed = self._charge(failed)
                if not is_transient(error) or not self._pause(error, delay):
                    raise
                delay = min(LONGEST, 2 * delay)
            else:
                if failed is not None:
                    with self._lock:
                        self._spent = 0.0
                return result

    def cancel(self) -> None:
        """End all waits; whatever fails from now on is not retried."""
        self._cancelled.set()

    def _charge(self, since: float | None) -> float:
        """Count the time since an action's last failure (None: there was none), unless another action's counted."""
        with self._lock:
            now = self._clock()
            if since is not None:
                self._spent += max(0.0, now - max(since, self._charged))
                self._charged = max(self._charged, now)
            return now

    def _pause(self, error: Exception, delay: float) -> bool:
        """False where there is to be no retry."""
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
