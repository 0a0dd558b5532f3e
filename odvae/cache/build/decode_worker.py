"""Worker processes that probe and decode files for a build, so that a file that crashes or hangs one does no harm.

    python -m odvae.cache.build.decode_worker FD    started by `decode_pool`; forks a worker for each socket over FD

Importing torch takes seconds, forking does not. A request is JSON; so is the response, followed by the bytes of an
array if there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ...data.failures import to_video_error
from ...data.scratch import Scratch
from ...data.sources import MediaRef, local_version_tag
from ...data.transforms import resize_crop
from ...data.video.image import is_animated
from ...data.video.reader import VideoError, VideoReader, count_readable, read_image
from ...utils.files import hash_file

MIN_ADDRESS_SPACE, MAX_ADDRESS_SPACE = 2**33, 2**35  # bytes: a damaged header may claim any frame size
MAX_FRAME_SECONDS = 3600.0  # that one frame may last: a damaged timestamp makes a short file last days
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a build knows of a file before it cuts clips from it."""

    content: str  # SHA-256
    height: int  # pixels, upright
    width: int
    frames: int = 1  # counted
    duration: float = 0.0  # s; 0 for a photo
    readable: int | None = None  # frames, of a truncated file
    cuts: tuple[float, ...] = ()  # s, where scenes after the first begin
    notes: tuple[str, ...] = ()  # see `VideoReader.notes`

    @property
    def is_photo(self) -> bool:
        return not self.duration


class OpenFile:
    """Keeps the last file open, because opening a long one reads it to its end.

    Attributes:
        usage: what the request has cost: "read_bytes", "fetched_bytes", "fetches", "fetch_seconds".
    """

    def __init__(self) -> None:
        self.usage: Counter[str] = Counter()
        self.scratch: Scratch | None = None
        self._key: Any = None
        self._stack = contextlib.ExitStack()
        self._video: VideoReader | None = None

    def video(self, ref: MediaRef, content: str, readable: int | None) -> VideoReader:
        if self._key != (ref, readable):
            self._stack.close()
            self._key = None
            path = self._stack.enter_context(self.local(ref))
            if ref.is_fetched:
                check_content(ref, path, content)
            self._video = self._stack.enter_context(VideoReader(path, readable))
            self._key = (ref, readable)
        assert self._video is not None
        return self._video

    @contextlib.contextmanager
    def local(self, ref: MediaRef) -> Iterator[Path]:
        """Provide a local file with the bytes of `ref`."""
        begin = time.monotonic()

        def count(size: int) -> None:
            self.usage.update(fetches=1, fetched_bytes=size)
            self.usage["fetch_seconds"] += time.monotonic() - begin  # type: ignore[assignment]

        with ref.open_local(self.scratch, count) as path:
            self.usage["read_bytes"] += path.stat().st_size
            yield path


def probe_file(open_file: OpenFile, ref: MediaRef, keep_truncated: bool, scenes: bool) -> MediaInfo:
    """Read a file once for its hash and once for its frame times. Raises VideoError."""
    with open_file.local(ref) as path:
        content = hash_file(path)
        if ref.is_image and not is_animated(path):
            height, width = read_image(path).shape[1:3]
            return MediaInfo(content, height, width)
        readable = None
        try:
            video = VideoReader(path)
        except VideoError as error:
            if error.kind != "truncated" or not keep_truncated:
                raise
            readable = count_readable(path)
            video = VideoReader(path, readable)
        with video:
            longest = float(np.diff(video.times, append=video.info.duration).max())
            if longest > MAX_FRAME_SECONDS:
                raise VideoError(f"{path} shows one frame for {longest:.0f} s: a timestamp in it is damaged",
                                 "encode it again", "corrupt")
            cuts = find_cuts(video) if scenes else ()
            if not ref.is_fetched:  # after reading: the content was the same throughout
                check_content(ref, path, content)
            return MediaInfo(
                content,
                video.info.height,
                video.info.width,
                video.info.frames,
                video.info.duration,
                readable,
                cuts,
                video.notes,
            )


def find_cuts(video: VideoReader) -> tuple[float, ...]:
    """Find the times (s) at which scenes begin, by PySceneDetect's content detector on downscaled frames."""
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError as error:
        raise VideoError("scene cuts need PySceneDetect", "pip install 'odvae-lvdm[scenes]'", "setup") from error
    detector, found, number = ContentDetector(min_scene_len=1), list[int](), 0
    scale = min(1.0, 128 / min(video.info.height, video.info.width))
    size = max(8, round(video.info.height * scale)), max(8, round(video.info.width * scale))
    for chunk in video.iter_chunks(chunk=16):
        for frame in resize_crop(chunk, *size):
            found += [cut.frame_num for cut in detector.process_frame(
                FrameTimecode(number, fps=video.info.frame_rate), np.ascontiguousarray(frame[..., ::-1]))]
            number += 1
    return tuple(float(video.times[cut]) for cut in found)


def check_content(ref: MediaRef, path: Path, content: str) -> None:
    """Raise VideoError if the bytes at `path` are not those that were probed, maybe days ago: their latents would get
    the ID of other content."""
    if local_version_tag(path) != ref.version_tag and hash_file(path) != content:
        raise VideoError(f"{ref} changed while the cache was built",
                         "build again; add --retry if it was changed back", "changed")


def decode_frames(open_file: OpenFile, ref: MediaRef, content: str, readable: int | None, start: float, count: int,
                  frame_rate: float, height: int, width: int) -> tuple[dict[str, float], np.ndarray]:
    """Decode `count` frames of a file from `start` s on: their `pixel_statistics`, and uint8 (T, height, width, 3)."""
    video: np.ndarray | None = None
    if ref.is_image:
        with open_file.local(ref) as path:
            if not is_animated(path):
                video = resize_crop(read_image(path), height, width)
                check_content(ref, path, content)
    if video is None:
        opened = open_file.video(ref, content, readable)
        video = opened.clip(start, count, frame_rate, partial(resize_crop, height=height, width=width))
        if not ref.is_fetched:
            check_content(ref, Path(ref.path), content)
    return pixel_statistics(video), video


def pixel_statistics(video: np.ndarray) -> dict[str, float]:
    """Measure uint8 (T, H, W, 3) on every second pixel's luma from 0 to 1: its mean, and the means over frames of its
    standard deviation, of the difference between neighbours in a row, and of that between frames."""
    luma = video[:, ::2, ::2] @ LUMA / 255
    return {"brightness": float(luma.mean()), "contrast": float(luma.std((1, 2)).mean()),
            "sharpness": float(np.abs(np.diff(luma, axis=2)).mean()) if luma.shape[2] > 1 else 0.0,
            "motion": float(np.abs(np.diff(luma, axis=0)).mean()) if len(luma) > 1 else 0.0}


def handle_request(open_file: OpenFile, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """Call the function that a request names; failures become part of the response. "usage" is what it has cost."""
    ref, scratch = MediaRef(**request.pop("ref")), request.pop("scratch", None)
    open_file.scratch, open_file.usage = scratch and Scratch(**scratch), Counter()
    is_probe, begin, video = request.pop("function") == "probe_file", time.monotonic(), None
    try:
        if is_probe:
            response = dataclasses.asdict(probe_file(open_file, ref, **request))
        else:
            statistics, video = decode_frames(open_file, ref, **request)
            response = statistics | {"shape": video.shape}
    except Exception as error:  # libraries raise anything on damaged bytes
        failure = to_video_error(error, str(ref))
        response = {"kind": failure.kind, "reason": failure.reason, "advice": failure.advice}
    seconds = time.monotonic() - begin - open_file.usage["fetch_seconds"]
    usage = open_file.usage | {"probe_seconds" if is_probe else "decode_seconds": seconds}
    return response | {"usage": usage}, video


def serve(connection: Connection) -> None:
    """Answer requests until the connection is closed."""
    open_file = OpenFile()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        response, video = handle_request(open_file, request)
        connection.send_bytes(json.dumps(response).encode())
        if video is not None:
            connection.send_bytes(np.ascontiguousarray(video).reshape(-1).data)


def run_worker(connection: Connection) -> None:
    """Serve a connection in a forked process, within its limits."""
    parent = os.getppid()

    def exit_with_parent() -> None:  # even while a decode hangs
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        # At most half of the memory: what ends processes when it is full must not choose the encoder.
        limit = min(MAX_ADDRESS_SPACE, max(MIN_ADDRESS_SPACE, psutil.virtual_memory().total // 2))
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first that the system ends
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(10)  # with few cores, one delayed thread of the encoder holds up all its others
    serve(connection)


def fork_workers(control: socket.socket) -> None:
    """Fork a worker for each socket that comes over the control socket, and reply with its PID."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the children
    import decord  # noqa: F401, once for all workers

    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            try:
                run_worker(Connection(sockets[0]))
            finally:
                os._exit(0)
        os.close(sockets[0])
        control.sendall(child.to_bytes(8, "big"))


def main() -> None:
    fork_workers(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
