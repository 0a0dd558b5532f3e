"""A pool of processes that probe and decode source files for a build."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.failures import Retry, retry_policy
from ...data.scratch import Scratch
from ...data.sources import MediaRef, is_url
from ...data.video.reader import VideoError
from ...utils.backoff import Backoff
from . import decode_worker
from .decode_worker import MediaInfo
from .usage import Usage

if TYPE_CHECKING:
    from .settings import BuildSettings

MAX_REQUESTS = 2000  # after which a process is replaced: video libraries leak


class DecodeWorker:
    """One worker process; used by one thread at a time."""

    def __init__(self, seconds: float, usage: Usage | None = None) -> None:
        self.seconds = seconds  # limit of a request
        self.usage = usage or Usage()
        self.ref: MediaRef | None = None  # of the last request; its file is still open
        self._process: int | None = None
        self._num_requests = 0
        self._is_cancelled = False

    def request(self, ref: MediaRef, function: str, **arguments: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        """Call a function of `decode_worker` in the process. Raises VideoError: as the function does, and if the
        process crashed or took too long."""
        is_new = self._process is None or self._num_requests >= MAX_REQUESTS
        if is_new:
            self._start()
        self.ref, self._num_requests = ref, self._num_requests + 1
        # A large or remote file may take longer to be read.
        limit = self.seconds + (ref.known_size or 0) / 1e7
        try:
            self._connection.send_bytes(json.dumps(
                {"function": function, "ref": dataclasses.asdict(ref), **arguments}).encode())
            response = self._wait(limit)
            self.usage.add(response.pop("usage", {}))
            if "reason" in response:
                raise VideoError(response["reason"], response["advice"], response["kind"])
            if "shape" not in response:
                return response, None
            array = np.empty(response.pop("shape"), np.uint8)
            self._connection.recv_bytes_into(array.reshape(-1).data)
            return response, array
        except TimeoutError as error:
            self.stop(kill=True)
            # Of a remote file it is the network rather than the file.
            raise VideoError(f"{ref} timed out after {limit:.0f} s",
                             "check the file, encode it again, or raise --file-seconds",
                             "remote" if is_url(ref.path) else "hang") from error
        except (EOFError, OSError) as error:
            self.stop()
            if self._is_cancelled:
                raise CancelledError from error
            if not is_new:  # the process may have been killed while idle, or damaged by the file before
                return self.request(ref, function, **arguments)
            raise VideoError(f"{ref} crashed the decoder", "encode it again, or leave it out", "crash") from error

    def _wait(self, limit: float) -> dict[str, Any]:
        if not self._connection.poll(limit):
            raise TimeoutError
        response: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return response

    def _start(self) -> None:
        self.stop()
        self._connection, self._process = _fork_server().fork()
        self._num_requests = 0
        if self._is_cancelled:  # meanwhile, when there was no process to kill yet
            self.cancel()

    def cancel(self) -> None:
        """Kill the process, in any thread; its request raises CancelledError."""
        self._is_cancelled = True
        if (process := self._process) is not None:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self, kill: bool = False) -> None:
        """Close the connection, on which the process exits unless it hangs; or kill it."""
        if self._process is not None:
            self._connection.close()
            if kill:
                with suppress(ProcessLookupError):
                    os.kill(self._process, signal.SIGKILL)
            self._process = self.ref = None


class _ForkServer:
    """The process that workers are forked from: one for all builds of this process. It ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.decode_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                process_group=0)  # Ctrl-C goes to the build, which stops the workers itself

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> tuple[Connection, int]:
        """Fork a worker; returns a connection to it and its PID."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            pid = self._control.recv(8)
        if not pid:
            raise RuntimeError("the process that decodes videos could not be started: "
                               f"`{sys.executable} -m {__package__}.decode_worker` exited")
        return Connection(ours.detach()), int.from_bytes(pid, "big")


class _ForkedServer(_ForkServer):
    """The same, but forked from this process, which must have no threads yet: nothing is imported again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            return
        try:
            os.dup2(theirs.detach(), 3)  # the only open file: nothing here keeps another process waiting
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))
            decode_worker.fork_workers(socket.socket(fileno=3))
        finally:
            os._exit(0)

    @property
    def alive(self) -> bool:
        return os.waitpid(self._pid, os.WNOHANG) == (0, 0)


def fork_server_here() -> None:
    """Fork the process that this one's workers are forked from, while this one has no threads."""
    _fork_servers[:] = [_ForkedServer()]


_fork_servers: list[_ForkServer] = []
_fork_server_lock = threading.Lock()


def _fork_server() -> _ForkServer:
    with _fork_server_lock:
        if not _fork_servers or not _fork_servers[0].alive:
            _fork_servers[:] = [_ForkServer()]
        return _fork_servers[0]


class DecodePool:
    """Several worker processes. A request goes to an idle one, if possible to the one that has the file open.

    Args:
        count: number of processes.
        seconds: limit of a request, plus one second per 10 MB of the file.
        backoff: how transient failures are retried; None: not at all.
        scratch: where remote files stay after they have been fetched; None: nowhere.
    """

    def __init__(self, count: int, seconds: float = 120.0, backoff: Backoff | None = None,
                 scratch: Scratch | None = None) -> None:
        self.count, self.seconds = count, seconds
        self.usage, self._scratch = Usage(), scratch and dataclasses.asdict(scratch)
        self._backoff = backoff or Backoff(0)
        self._workers = [DecodeWorker(seconds, self.usage) for _ in range(count)]
        self._idle = list(self._workers)
        self._free = threading.Condition()
        self._cancelled = False

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests and processes."""
        self.cancel()
        for worker in self._idle:
            worker.stop()

    def cancel(self) -> None:
        """End all requests and waits for retries, and refuse requests from now on: by CancelledError, for threads that
        work ahead."""
        self._cancelled = True
        self._backoff.cancel()
        for worker in self._workers:
            worker.cancel()

    def probe(self, ref: MediaRef, *, keep_truncated: bool = False, scenes: bool = False) -> MediaInfo:
        """Probe a file, see `decode_worker.probe_file`. Raises VideoError."""
        info, _ = self._request(ref, "probe_file", keep_truncated=keep_truncated, scenes=scenes)
        return MediaInfo(**info | {"cuts": tuple(info["cuts"]), "notes": tuple(info["notes"])})

    def decode_frames(
        self,
        ref: MediaRef,
        *,
        content: str,
        readable: int | None,
        start: float,
        count: int,
        frame_rate: float,
        height: int,
        width: int,
    ) -> tuple[dict[str, float], np.ndarray]:
        """Decode a clip: its `decode_worker.pixel_statistics`, and uint8 (T, H, W, 3). Raises VideoError, also if the
        file's SHA-256 is no longer `content`."""
        statistics, video = self._request(ref, "decode_frames", content=content, readable=readable, start=start,
                                          count=count, frame_rate=frame_rate, height=height, width=width)
        assert video is not None
        return statistics, video

    def _request(self, ref: MediaRef, function: str, **arguments: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        attempts = 0

        def attempt() -> tuple[dict[str, Any], np.ndarray | None]:
            nonlocal attempts
            if self._cancelled:
                raise CancelledError
            if attempts:
                self.usage.add({"retries": 1})
            attempts += 1
            with self._checkout(ref) as worker:  # not held while waiting for a retry
                return worker.request(ref, function, scratch=self._scratch, **arguments)

        return self._backoff.run(attempt, is_transient=lambda error: retry_policy(error) is Retry.BACKOFF)

    @contextmanager
    def _checkout(self, ref: MediaRef) -> Iterator[DecodeWorker]:
        with self._free:
            self._free.wait_for(lambda: self._idle)
            worker = next((one for one in self._idle if one.ref == ref), self._idle[0])
            self._idle.remove(worker)
        try:
            yield worker
        finally:
            with self._free:
                self._idle.append(worker)
                self._free.notify()


def probe_each(workers: DecodePool, settings: BuildSettings,
               refs: Sequence[MediaRef]) -> Iterator[MediaInfo | VideoError]:
    """Probe files in worker processes, and yield what is known of each, in order."""
    def probe(ref: MediaRef) -> MediaInfo | VideoError:
        try:
            return workers.probe(ref, keep_truncated=settings.keep_truncated, scenes=settings.clips == "scenes")
        except VideoError as error:
            return error

    if not refs:
        return
    with ThreadPoolExecutor(workers.count) as pool:
        try:
            yield from pool.map(probe, refs)
        except BaseException:
            workers.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
