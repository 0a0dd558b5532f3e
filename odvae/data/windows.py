"""Random windows of training clips, as a pure function of (seed, step, rank)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ..runtime.config import Config
from ..runtime.errors import UserError
from ..runtime.progress import track
from ..runtime.seeding import generator
from .clips import list_videos
from .transforms import resize_crop, to_tensor
from .video import VideoError, count_frames, probe, read_clip

logger = logging.getLogger("odvae")


class DataConfig(Config):
    folder: Path = Path("data")  # videos
    frames: int = Field(17, ge=1)  # a window, 1 + 4k
    frame_rate: float = Field(8.0, gt=0)  # frames a second that windows are sampled at
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    held_out: int = Field(16, ge=0)  # clips, the first by name, that are not trained on but evaluated
    memory_mb: int = Field(4096, ge=0)  # decoded clips that are kept in memory


class Clips:
    """The clips of a folder that are long enough, decoded once and kept as long as `memory_mb` allows.

    Attributes:
        paths: the usable files.
        set_aside: (file, reason) of the others.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.paths: list[Path] = []
        self.lengths: list[int] = []
        self.set_aside: list[tuple[Path, str]] = []
        self._decoded: dict[int, np.ndarray] = {}
        self._budget = config.memory_mb * 2**20
        for path in track(list_videos(config.folder), "look at clips", "clip"):
            self._add(path)
        if self.set_aside:
            logger.warning("set aside %d of %d files, the first: %s: %s", len(self.set_aside),
                           len(self.set_aside) + len(self.paths), *self.set_aside[0])
        if not self.paths:
            raise UserError(f"no clip in {config.folder} has {config.frames} frames at {config.frame_rate} fps; "
                            f"the first was set aside because: {self.set_aside[0][1]}")

    def _add(self, path: Path) -> None:
        try:
            info = probe(path)
        except VideoError as error:
            self.set_aside.append((path, str(error)))
            return
        length = count_frames(info.duration, self.config.frame_rate)
        if length < self.config.frames:
            self.set_aside.append((path, f"has {length} frames at {self.config.frame_rate} fps, shorter than the "
                                         f"{self.config.frames} asked for (data.frames)"))
            return
        self.paths.append(path)
        self.lengths.append(length)

    def __len__(self) -> int:
        return len(self.paths)

    def window(self, clip: int, start: int, frames: int | None = None) -> np.ndarray:
        """`frames` frames (default: all that a window has) of clip `clip` from frame `start`: uint8 (T, H, W, 3)."""
        c = self.config
        frames = frames or c.frames
        if clip in self._decoded:
            return self._decoded[clip][start : start + frames]
        whole = self.lengths[clip] * c.height * c.width * 3
        if whole <= self._budget:
            video = resize_crop(read_clip(self.paths[clip], 0.0, self.lengths[clip], c.frame_rate), c.height, c.width)
            self._decoded[clip] = video
            self._budget -= whole
            return video[start : start + frames]
        return resize_crop(read_clip(self.paths[clip], start / c.frame_rate, frames, c.frame_rate), c.height, c.width)

    def batch(self, step: int, rank: int, size: int, seed: int) -> Tensor:
        """Windows of `size` training clips drawn at random: (size, 3, T, H, W) in [-1, 1]."""
        rng = generator(seed, "windows", step, rank)
        first = min(self.config.held_out, len(self) - 1)
        clips = torch.randint(first, len(self), (size,), generator=rng).tolist()
        starts = [int(torch.randint(0, self.lengths[i] - self.config.frames + 1, (), generator=rng)) for i in clips]
        return torch.stack([to_tensor(self.window(i, s)) for i, s in zip(clips, starts, strict=True)])

    def held_out(self) -> list[Tensor]:
        """The first window of each held-out clip, (3, T, H, W) in [-1, 1]."""
        return [to_tensor(self.window(i, 0)) for i in range(min(self.config.held_out, len(self)))]
