"""Probe the files of a training, each once: spread over its processes, and in each over threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..trainer.distributed import gather, num_processes, process_index
from ..utils.progress import track
from ..utils.threads import map_ahead
from .files import is_image
from .video.image import is_animated
from .video.reader import VideoError, VideoInfo, probe, read_image

THREADS = min(16, 2 * (os.cpu_count() or 1))  # reading waits for a disk or a network

Probed = VideoInfo | VideoError | None  # None: a photo, which is readable
ProbeResults = dict[Path, Probed]


def probe_files(paths: Sequence[Path]) -> ProbeResults:
    """Probe different files, each read to its end. All processes must call it with the same paths, and get all results.
    """
    mine = paths[process_index()::num_processes()]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(track(map_ahead(pool, _probe, mine, 2 * THREADS), "probe files", "file", len(mine)))
    every = {path: result for part in gather(dict(zip(mine, results, strict=True))) for path, result in part.items()}
    return {path: every[path] for path in paths}


def _probe(path: Path) -> Probed:
    try:
        if is_image(path) and not is_animated(path):
            read_image(path)
            return None
        return probe(path)
    except VideoError as error:
        return error
