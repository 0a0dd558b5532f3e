"""The real videos that generated ones are compared with, and that predictions continue."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from odvae.data.files import list_videos
from odvae.data.transforms import resize_crop
from odvae.data.video.reader import VideoError, read_clip
from odvae.utils.errors import UserError
from odvae.utils.progress import track
from odvae.utils.seeding import generator

from ..sampling.pipeline import LVDMPipeline


class ReferenceVideos:
    """The beginnings of a folder's videos, at the pipeline's size and rate. They are taken in a random order, the same
    every time: where there are more than needed, neighbours in the folder may all be of one class.

    Attributes:
        paths: the videos that `clips` has given.
        skipped: why others were not.
    """

    def __init__(self, folder: Path, pipeline: LVDMPipeline) -> None:
        self.folder, self.pipeline = folder, pipeline
        self.paths: list[Path] = []
        self.skipped: list[str] = []

    def clips(self, count: int, frames: int) -> Iterator[np.ndarray]:
        """Read up to `count` clips, uint8 (frames, H, W, 3)."""
        videos = list_videos(self.folder)
        order = torch.randperm(len(videos), generator=generator(0, "reference")).tolist()
        for i in track(order, "reference videos", "video"):
            if len(self.paths) == count:
                break
            try:
                clip = self._read(videos[i], frames)
            except VideoError as error:
                self.skipped.append(f"reference video skipped: {error}")
                continue
            self.paths.append(videos[i])
            yield clip

    def given(self, first: int, count: int, frames: int) -> tuple[np.ndarray, Tensor]:
        """Return the first frames of videos `first` to `first + count` of those that `clips` has given, from the first
        one again after the last: uint8 (count, frames, H, W, 3), and their normalized latents (count, c, t, h, w).

        Raises:
            UserError: `clips` has given none.
        """
        if not self.paths:
            raise UserError(f"no video of {self.folder} can be continued, see above; the Frechet distance must be "
                            "measured too")
        chosen = [self.paths[i % len(self.paths)] for i in range(first, first + count)]
        videos = [self._read(path, frames) for path in chosen]
        return np.stack(videos), torch.cat([self.pipeline.encode_video(video) for video in videos])

    def _read(self, path: Path, frames: int) -> np.ndarray:
        config = self.pipeline.transformer.config
        return read_clip(path, 0.0, frames, config.frame_rate,
                         partial(resize_crop, height=config.sample_height, width=config.sample_width))
