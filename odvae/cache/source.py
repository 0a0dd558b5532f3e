"""The builder's input: which clips its source gives, and their pixels, decoded in threads ahead of the encoder."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.clips import ClipSpec, Listed, SetAside, clips_of, is_image
from ..data.transforms import resize_crop, to_tensor
from ..data.video import Video, VideoError, read_image
from ..runtime.files import hash_file
from ..runtime.progress import track
from .format import ClipHeader, Header, clip_id


@dataclass(frozen=True)
class Item:
    """A clip that belongs into the cache."""

    id: str
    content: str  # SHA-256 of the file
    name: str  # of the file, relative to the source folder or to the list's
    clip: ClipSpec


def plan(root: Path, listed: Sequence[Listed], header: Header,
         workers: int) -> tuple[list[Item], list[SetAside]]:
    """The clips of all files in order, each file read once for its hash and once for its frames' times.

    Args:
        root: the folder that names are relative to.
        listed: a file's spans count where its first one stands.
    """
    key, clip = header.key(), header.clip
    by_file: dict[Path, list[Listed]] = {}
    for one in listed:
        by_file.setdefault(one.path, []).append(one)

    def look(spans: list[Listed]) -> tuple[list[Item], list[SetAside]]:
        items, aside, path = list[Item](), list[SetAside](), spans[0].path
        name = Path(os.path.relpath(path, root)).as_posix()
        try:
            content = hash_file(path)
        except OSError as error:
            return [], [SetAside(path, str(error))]
        for span in spans:
            try:
                items += [Item(clip_id(content, spec, key), content, name, spec)
                          for spec in clips_of(span, clip.frames, clip.frame_rate)]
            except (VideoError, OSError) as error:
                aside.append(SetAside(path, str(error)))
        return items, aside

    items: list[Item] = []
    aside: list[SetAside] = []
    with ThreadPoolExecutor(workers) as pool:
        for found, failed in track(pool.map(look, by_file.values()), "look at the files", "file", total=len(by_file)):
            items += found
            aside += failed
    return items, aside


@contextmanager
def decoded(items: Sequence[Item], size: ClipHeader, dtype: torch.dtype, *, batch: int,
            workers: int) -> Iterator[Iterator[Tensor | VideoError]]:
    """The videos (C, T, H, W) in [-1, 1] of all items in order, or why there is none.

    Threads decode about two batches ahead (at least one piece of work each); they end with the block.
    """
    files = _OpenFiles(workers)

    def load(some: Sequence[Item]) -> list[Tensor | VideoError]:
        found: list[Tensor | VideoError] = []
        for item in some:
            try:
                found.append(to_tensor(_frames(files, item.clip, size)).to(dtype))
            except VideoError as error:
                found.append(error)
        return found

    # A piece of work is at most a batch of clips of one file.
    work = [run[cut:cut + batch] for run in (list(group) for _, group in groupby(items, lambda item: item.clip.path))
            for cut in range(0, len(run), batch)]
    pool = ThreadPoolExecutor(workers)

    def videos() -> Iterator[Tensor | VideoError]:
        ahead: deque[Future[list[Tensor | VideoError]]] = deque()
        counts: deque[int] = deque()
        for some in work:
            while len(ahead) >= workers and sum(counts) >= 2 * batch:
                counts.popleft()
                yield from ahead.popleft().result()
            ahead.append(pool.submit(load, some))
            counts.append(len(some))
        for future in ahead:
            yield from future.result()

    try:
        yield videos()
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()


def _frames(files: _OpenFiles, clip: ClipSpec, size: ClipHeader) -> np.ndarray:
    """uint8 (T, H, W, 3) at the cache's size."""
    if is_image(clip.path):
        return resize_crop(read_image(clip.path), size.height, size.width)
    with files.borrow(clip.path) as video:
        # A whole clip of large frames takes gigabytes; small ones come at once.
        piece = max(1, 2**26 // (video.info.height * video.info.width * 3))
        pieces = video.pieces(clip.start, clip.frames, clip.frame_rate, piece)
        return np.concatenate([resize_crop(part, size.height, size.width) for part in pieces])


class _OpenFiles:
    """Keeps the files used last open, because opening a long one reads it to its end."""

    def __init__(self, keep: int) -> None:
        self._keep, self._idle, self._lock = keep, list[Video](), threading.Lock()

    @contextmanager
    def borrow(self, path: Path) -> Iterator[Video]:
        """An open file that no other thread uses meanwhile."""
        with self._lock:
            place = next((i for i, video in enumerate(self._idle) if video.path == path), None)
            video = None if place is None else self._idle.pop(place)
        video = video or Video(path)
        try:
            yield video
        finally:
            with self._lock:
                self._idle.append(video)
                oldest = self._idle.pop(0) if len(self._idle) > self._keep else None
            if oldest is not None:
                oldest.close()

    def close(self) -> None:
        for video in self._idle:
            video.close()
        self._idle.clear()
