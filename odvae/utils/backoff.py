"""Retries with exponential backoff, and a limit on the total waiting time of a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # s; each delay is twice the one before
RECOVERY = 20.0  # s without a failure that restore a second of patience

logger = logging.getLogger(__name__)


class Backoff:
    """Retry actions whose failures are transient. Shared by the threads of one run.

    An outage blocks every thread, and all continue when it ends. The time during which at least one action is being
    retried counts against `patience`. It is restored when a retried action succeeds, and by a twentieth of the time
    without retries. So files that never recover cost a run `patience` seconds and a twentieth of its time at most in
    total, not each; and hours after an outage that was too long the next one is waited for again. (Success without a
    retry restores nothing: next to each broken file there are good ones.)

    Args:
        patience: s; no retry starts once they are used up. 0: no retries.
        clock: s, monotonic.
        wait: sleep for this many seconds; True ends all retries.
    """

    def __init__(self, patience: float, *, clock: Callable[[], float] = time.monotonic,
                 wait: Callable[[float], bool] | None = None) -> None:
        self.patience = patience
        self._clock = clock
        self._cancelled = threading.Event()
        self._wait = wait or self._cancelled.wait
        self._lock = threading.Lock()
        self._spent = 0.0  # s of patience
        self._counted = clock()  # up to this time
        self._retried = self._waiting = 0  # actions

    def run(self, action: Callable[[], T], is_transient: Callable[[Exception], bool]) -> T:
        """Return the action's result, or raise its last exception."""
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            failure = error
        delay = FIRST_DELAY
        with self._retrying():
            while self._pause(failure, delay):
                delay = min(MAX_DELAY, 2 * delay)
                try:
                    result = action()
                except Exception as error:
                    if not is_transient(error):
                        raise
                    failure = error
                else:
                    self._count(recovered=True)
                    return result
        raise failure

    def cancel(self) -> None:
        """End all waits; failures from now on are not retried."""
        self._cancelled.set()

    @contextmanager
    def _retrying(self) -> Iterator[None]:
        self._count(more=1)
        try:
            yield
        finally:
            self._count(more=-1)

    def _count(self, more: int = 0, recovered: bool = False) -> None:
        """Count the time since the last call; from now on `more` further actions are being retried."""
        with self._lock:
            now = self._clock()
            passed, self._counted = now - self._counted, now
            self._spent = self._spent + passed if self._retried else max(0.0, self._spent - passed / RECOVERY)
            self._retried += more
            if recovered:
                self._spent = 0.0

    def _pause(self, error: Exception, delay: float) -> bool:
        """Wait before the next retry; False if there is to be none."""
        self._count()
        with self._lock:
            if self._spent >= self.patience or self._cancelled.is_set():
                return False
            first, self._waiting = self._waiting == 0, self._waiting + 1
        if first:  # only one of the threads that an outage blocks logs it
            logger.warning("%s; retrying in %.0f s", error, delay)
        try:
            return not self._wait(delay)
        finally:
            with self._lock:
                self._waiting -= 1
