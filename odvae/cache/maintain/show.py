"""Show clips of a cache: a contact sheet, or a grid of videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.transforms import to_uint8
from ...data.video.reader import write_video
from ...utils.errors import UserError
from ...utils.plots import contact_sheet
from ...utils.seeding import generator
from ..encoder import LatentEncoder
from ..reader import LatentCache
from .query import run_query


def show(path: Path, vae: Any, out: Path, count: int = 12, where: str | None = None, seed: int = 0) -> None:
    """Decode random clips into a contact sheet (.png) or a video grid (.mp4).

    Args:
        where: an SQL condition on the clips.

    Raises:
        UserError: another VAE, no clips, a file name with another suffix.
    """
    if out.suffix.lower() not in (".png", ".mp4"):
        raise UserError(f"{out} is neither a .png nor a .mp4")
    cache, encoder = LatentCache(path, vae), LatentEncoder(vae)
    candidates = list(range(len(cache)))
    if where is not None:
        with run_query(path, f"select id from clips where {where}") as reader:
            matching = set(reader.read_all()["id"].to_pylist())
        candidates = [i for i in candidates if cache.ids[i] in matching]
        if not candidates:
            raise UserError(f"no clip of {path} matches {where}")
    order = torch.randperm(len(candidates), generator=generator(seed, "show")).tolist()[:count]
    clips = [candidates[i] for i in order]
    sizes = zip(*(cache.take(clips, name) for name in ("frames", "height", "width")), strict=True)
    videos = [to_uint8(encoder.decode(cache.entry(i).float(), *size)[0]) for i, size in zip(clips, sizes, strict=True)]
    if out.suffix.lower() == ".png":
        texts = zip(cache.take(clips, "captions"), cache.take(clips, "path"), strict=True)
        contact_sheet(videos, out, [f"{captions[0]}  ({name})" for captions, name in texts])
        return
    write_video(out, [_grid(videos)], cache.header.transform.frame_rate)


def _grid(videos: list[np.ndarray]) -> np.ndarray:
    """Tile videos into one as long as the longest; shorter ones hold their last frame."""
    length = max(map(len, videos))
    height, width = (max(video.shape[axis] for video in videos) for axis in (1, 2))
    columns = max(1, round((len(videos) * height / width) ** .5))
    grid = np.zeros((length, -(-len(videos) // columns) * height, columns * width, 3), np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * height, i % columns * width
        t, h, w = video.shape[:3]
        grid[:t, top:top + h, left:left + w] = video
        grid[t:, top:top + h, left:left + w] = video[-1]
    return grid
