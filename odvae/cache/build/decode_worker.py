"""Processes that look at files and decode them for a build, so that a file that crashes or hangs one does no harm.

    python -m odvae.cache.build.decode_worker FD    started by `decode_pool`; forks a worker for each socket over FD

To import torch takes seconds, to fork none. A request to a worker is JSON; so is the answer, and after it come the
bytes of an array where there is one.
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
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.failures import as_failure
from ...data.sources import MediaRef, local_version_tag
from ...data.transforms import resize_crop
from ...data.video.image import is_animated
from ...data.video.reader import VideoError, VideoReader, count_readable, read_image
from ...utils.files import hash_file

MEMORY = 2**35  # bytes of address space: a damaged header may ask for any size of picture
STILL = 3600.0  # s that one frame may be shown: a damaged time makes a short file one of days
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What there is to know of a file before it is cut into clips."""

    content: str  # SHA-256
    height: int  # pixels, upright
    width: int
    frames: int = 1  # counted
    duration: float = 0.0  # s; 0 of a photo
    readable: int | None = None  # frames, of a file that is cut off
    cuts: tuple[float, ...] = ()  # s, where scenes begin, but the first
    notes: tuple[str, ...] = ()  # see `VideoReader.notes`

    @property
    def is_photo(self) -> bool:
        return not self.duration


class Files:
    """Keeps the file used last open: opening a long one reads it to its end."""

    def __init__(self) -> None:
        self._key: Any = None
        self._stack = contextlib.ExitStack()
        self._video: VideoReader | None = None

    def video(self, place: MediaRef, content: str, readable: int | None) -> VideoReader:
        if self._key != (place, readable):
            self._stack.close()
            self._key = None
            path = self._stack.enter_context(place.open_local())
            if place.is_fetched:
                check_content(place, path, content)
            self._video = self._stack.enter_context(VideoReader(path, readable))
            self._key = (place, readable)
        assert self._video is not None
        return self._video


def probe_file(files: Files, place: MediaRef, keep_truncated: bool, scenes: bool) -> MediaInfo:
    """Read a file once for its hash and once for its frames' times. Raises VideoError."""
    with place.open_local() as path:
        content = hash_file(path)
        if place.is_image and not is_animated(path):
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
            if longest > STILL:
                raise VideoError(f"{path} shows one frame for {longest:.0f} s: a time in it is damaged",
                                 "encode it again", "corrupt")
            cuts = find_cuts(video) if scenes else ()
            if not place.is_fetched:  # after it was read: what was so then was so before
                check_content(place, path, content)
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
    """The times (s) at which a scene begins, by PySceneDetect's content detector on small pictures."""
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


def check_content(place: MediaRef, path: Path, content: str) -> None:
    """Raises VideoError where the bytes at `path` are not those that were looked at, which may be days ago: their
    latents would bear the name of other content."""
    if local_version_tag(path) != place.version_tag and hash_file(path) != content:
        raise VideoError(f"{place} was changed while the cache was built",
                         "build again; where it is what it was before, with --retry", "changed")


def frames(files: Files, place: MediaRef, content: str, readable: int | None, start: float, count: int,
           frame_rate: float, height: int, width: int) -> tuple[dict[str, float], np.ndarray]:
    """`count` frames of a file from `start` s on, uint8 (T, height, width, 3), and their `figures`."""
    video: np.ndarray | None = None
    if place.is_image:
        with place.open_local() as path:
            if not is_animated(path):
                video = resize_crop(read_image(path), height, width)
                check_content(place, path, content)
    if video is None:
        opened = files.video(place, content, readable)
        video = opened.clip(start, count, frame_rate, partial(resize_crop, height=height, width=width))
        if not place.is_fetched:
            check_content(place, Path(place.path), content)
    return figures(video), video


def figures(video: np.ndarray) -> dict[str, float]:
    """Of uint8 (T, H, W, 3), on luma from 0 to 1, of every second pixel: the mean, the mean over frames of the standard
    deviation, of the difference between neighbours in a row, and of that between frames."""
    luma = video[:, ::2, ::2] @ LUMA / 255
    return {"brightness": float(luma.mean()), "contrast": float(luma.std((1, 2)).mean()),
            "sharpness": float(np.abs(np.diff(luma, axis=2)).mean()) if luma.shape[2] > 1 else 0.0,
            "motion": float(np.abs(np.diff(luma, axis=0)).mean()) if len(luma) > 1 else 0.0}


def answer(files: Files, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    place = MediaRef(**request.pop("place"))
    try:
        if request.pop("function") == "look":
            return dataclasses.asdict(probe_file(files, place, **request)), None
        found, video = frames(files, place, **request)
        return found | {"shape": video.shape}, video
    except Exception as error:  # whatever a library makes of damaged bytes
        failure = as_failure(error, str(place))
        return {"kind": failure.kind, "reason": failure.reason, "advice": failure.advice}, None


def serve(connection: Connection) -> None:
    files = Files()
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        found, video = answer(files, request)
        connection.send_bytes(json.dumps(found).encode())
        if video is not None:
            connection.send_bytes(np.ascontiguousarray(video).reshape(-1).data)


def work(connection: Connection) -> None:
    """A worker's life, in a process of its own."""
    parent = os.getppid()

    def end_with_the_parent() -> None:  # also in the middle of a decode that hangs
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.nice(10)  # on few cores the encoder's threads wait for each other when one of them is held up
    serve(connection)


def main() -> None:
    """Fork a worker for each socket that comes over the control socket, and answer with its process number."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    import decord  # noqa: F401, once for all

    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            try:
                work(Connection(sockets[0]))
            finally:
                os._exit(0)
        os.close(sockets[0])
        control.sendall(child.to_bytes(8, "big"))


if __name__ == "__main__":
    main()
