"""The decoding processes of a build, and what a build asks of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ...data.failures import Retry, retry_of
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.backoff import Backoff
from .decode_worker import MediaInfo

MAX_REQUESTS = 2000  # requests, after which a process is replaced: video libraries leak


class Worker:
    """One process; used by one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # that a request may take
        self.place: MediaRef | None = None  # asked for last, so still open
        self._process: int | None = None
        self._asked = 0

    def request(self, place: MediaRef, function: str, **arguments: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        """Raises VideoError: as the function does, and where the process crashed or took too long."""
        fresh = self._process is None or self._asked >= MAX_REQUESTS
        if fresh:
            self._start()
        self.place, self._asked = place, self._asked + 1
        # A file that is large, or far away, may take longer to be read.
        limit = self.seconds + _size(place) / 1e7
        try:
            self._connection.send_bytes(json.dumps(
                {"function": function, "place": dataclasses.asdict(place), **arguments}).encode())
            found = self._wait(limit)
            if "reason" in found:
                raise VideoError(found["reason"], found["advice"], found["kind"])
            if "shape" not in found:
                return found, None
            shape = found.pop("shape")
            array = np.empty(shape, np.uint8)
            self._connection.recv_bytes_into(array.reshape(-1).data)
            return found, array
        except TimeoutError as error:
            self.stop(kill=True)
            # Of one that has to be fetched it is the network rather than the file.
            raise VideoError(f"{place} took more than {limit:.0f} s and was given up",
                             "look at the file, encode it again, or allow more with --file-seconds",
                             "remote" if is_url(place.path) else "hang") from error
        except (EOFError, OSError) as error:
            self.stop()
            if not fresh:  # it may have been killed while it was idle, or by what the file before did to it
                return self.request(place, function, **arguments)
            raise VideoError(f"{place} made the decoder crash", "encode it again, or leave it out", "crash") from error

    def _wait(self, limit: float) -> dict[str, Any]:
        if not self._connection.poll(limit):
            raise TimeoutError
        found: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return found

    def _start(self) -> None:
        self.stop()
        self._connection, self._process = _fork_server().worker()
        self._asked = 0

    def stop(self, kill: bool = False) -> None:
        """End the process: it ends by itself when it is asked for no more, unless it hangs."""
        if self._process is not None:
            self._connection.close()
            if kill:
                with suppress(ProcessLookupError):
                    os.kill(self._process, signal.SIGKILL)
            self._process = self.place = None


class _ForkServer:
    """The process that workers are forked from; one for all builds of this process, and it ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.decode_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0)  # Ctrl-C is for the build, which ends the workers by itself

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def worker(self) -> tuple[Connection, int]:
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            number = self._control.recv(8)
        if not number:
            raise RuntimeError("the process that decodes videos could not be started: "
                               f"`{sys.executable} -m {__package__}.decode_worker` ended")
        return Connection(ours.detach()), int.from_bytes(number, "big")


_shared: list[_ForkServer] = []
_sharing = threading.Lock()


def _fork_server() -> _ForkServer:
    with _sharing:
        if not _shared or not _shared[0].alive:
            _shared[:] = [_ForkServer()]
        return _shared[0]


class Workers:
    """Several of them; a thread that asks gets one that is idle, if possible the one that has the file open.

    Args:
        count: how many.
        seconds: that one request may take, and one second more for each 10 MB of the file.
        backoff: how transient failures are retried; None: not at all.
    """

    def __init__(self, count: int, seconds: float = 120.0, backoff: Backoff | None = None) -> None:
        self.count, self.seconds = count, seconds
        self._backoff = backoff or Backoff(0)
        self._idle = [Worker(seconds) for _ in range(count)]
        self._free = threading.Condition()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel_retries()
        for worker in self._idle:
            worker.stop()

    def cancel_retries(self) -> None:
        """Let no thread wait any longer for a failure to pass."""
        self._backoff.cancel()

    def look(self, place: MediaRef, *, keep_truncated: bool = False, scenes: bool = False) -> MediaInfo:
        """Raises VideoError."""
        found, _ = self._ask(place, "look", keep_truncated=keep_truncated, scenes=scenes)
        return MediaInfo(**found | {"cuts": tuple(found["cuts"]), "notes": tuple(found["notes"])})

    def frames(
        self,
        place: MediaRef,
        *,
        content: str,
        readable: int | None,
        start: float,
        count: int,
        frame_rate: float,
        height: int,
        width: int,
    ) -> tuple[dict[str, float], np.ndarray]:
        """uint8 (T, H, W, 3) and `worker.figures`. Raises VideoError, also where the file's SHA-256 is no more
        `content`."""
        found, video = self._ask(place, "frames", content=content, readable=readable, start=start, count=count,
                                 frame_rate=frame_rate, height=height, width=width)
        assert video is not None
        return found, video

    def _ask(self, place: MediaRef, function: str, **arguments: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        def ask() -> tuple[dict[str, Any], np.ndarray | None]:
            with self._borrowed(place) as worker:  # not while a retry is waited for
                return worker.request(place, function, **arguments)

        return self._backoff.run(ask, is_transient=lambda error: retry_of(error) is Retry.BACKOFF)

    @contextmanager
    def _borrowed(self, place: MediaRef) -> Iterator[Worker]:
        with self._free:
            self._free.wait_for(lambda: self._idle)
            worker = next((one for one in self._idle if one.place == place), self._idle[0])
            self._idle.remove(worker)
        try:
            yield worker
        finally:
            with self._free:
                self._idle.append(worker)
                self._free.notify()


def _size(place: MediaRef) -> int:
    with suppress(OSError, ValueError):
        return place.size or int(place.version_tag.partition(":")[0] or 0)
    return 0
