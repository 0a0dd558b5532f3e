"""What a distilled decoder is trained on: the latents of a VAE, with its frames and the footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.dataset import BucketBatches, LatentDataset
from ..cache.reader import LatentCache
from ..data.dataset import DataConfig, VideoBatch, VideoClipDataset
from ..data.transforms import to_float
from ..inference.adapters import load_autoencoder
from ..utils.errors import UserError

STATISTICS_BATCHES = 8  # that the latents' mean and deviation are measured over


class Teacher(nn.Module):
    """Any video VAE, ours or diffusers', in float32 and frozen.

    Raises:
        UserError: it cannot be loaded, or is an image VAE.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.adapter = load_autoencoder(source)
        if self.adapter.is_image_model:
            raise UserError(f"{source} holds an image VAE, whose frames know nothing of each other; a decoder is "
                            f"distilled from a video VAE")
        self.model: nn.Module = self.adapter.model
        self.time, self.space = self.adapter.temporal_compression, self.adapter.spatial_compression

    def encode(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> the mean of its latents, float32 (B, c, t, h, w)."""
        return self.adapter.encode(video).float().clone()  # no tensor of inference mode, which cannot be trained on

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, t, h, w) -> video, float32 (B, 3, T, H, W)."""
        t, h, w = latents.shape[2:]
        video = self.adapter.decode(latents.to(next(self.model.parameters()).dtype), 1 + self.time * (t - 1),
                                    self.space * h, self.space * w)
        return video.to(latents.device).clone()


@dataclass(frozen=True)
class LatentBatch:
    latents: Tensor  # float32 (B, c, t, h, w)
    names: tuple[str, ...]
    time: int  # frames of a latent

    @property
    def frames(self) -> int:
        """Number of frames that all of them decode to."""
        return self.latents.shape[0] * (1 + self.time * (self.latents.shape[2] - 1))


Sample = tuple[Tensor, Tensor | None]  # latents (B, c, t, h, w), and the footage (B, 3, T, H, W) if it is there


class DistillationData(Protocol):
    def batch(self, step: int, micro_batch: int, num_micro_batches: int) -> VideoBatch | LatentBatch:
        """Draw a batch, as a pure function of its arguments."""

    def held_out(self) -> Sequence[Sample]:
        """Return the clips for evaluation, each as a batch of one."""


def sample_of(batch: VideoBatch | LatentBatch, teacher: Teacher, device: torch.device) -> Sample:
    """Return the latents of a batch, and the footage if it holds it, on a device."""
    if isinstance(batch, LatentBatch):
        return batch.latents.to(device, non_blocking=True), None
    video = to_float(batch.video.to(device, non_blocking=True))
    return teacher.encode(video), video


class VideoData:
    """Clips of footage, which the teacher encodes anew every time.

    Raises:
        UserError: as `VideoClipDataset`; windows that do not fit the teacher, naming the nearest that do.
    """

    def __init__(self, config: DataConfig, teacher: Teacher, batch: int, seed: int) -> None:
        for window in config.windows():
            size = window.frames, window.height, window.width
            if (fit := teacher.adapter.padded_size(*size)) != size:
                raise UserError(f"windows of {size[0]} frames of {size[1]}x{size[2]} (data) do not fit the VAE; the "
                                f"next that do have {fit[0]} frames of {fit[1]}x{fit[2]}")
        self.clips, self.teacher, self.size, self.seed = VideoClipDataset(config), teacher, batch, seed

    def batch(self, step: int, micro_batch: int, num_micro_batches: int) -> VideoBatch:
        return self.clips.batch(step, micro_batch, self.size, self.seed)

    def held_out(self) -> list[Sample]:
        clips = self.clips.held_out() or list(to_float(self.clips.batch(0, 0, 4, self.seed).video))
        device = next(self.teacher.model.parameters()).device
        return [(self.teacher.encode(clip[None].to(device)).cpu(), clip[None]) for clip in clips]


class CacheData:
    """Clips of a latent cache, from their first latent on, which alone holds a single frame.

    Args:
        frames: of a clip at most.
        held_out: clips for evaluation, the first of the bucket with the largest shape; they are not trained on.

    Raises:
        UserError: no cache, or one of another VAE; no clip is left to train on.
    """

    def __init__(self, path: Path, teacher: Teacher, *, frames: int, held_out: int, batch: int, seed: int) -> None:
        cache = LatentCache(path, vae=teacher.model)
        if not cache.lists_clips:
            raise UserError(f"{path} is in an object store or too large to be listed; distill on a local cache")
        self.time, self.size, self.seed = teacher.time, batch, seed
        self.latents = 1 + max(0, frames - 1) // teacher.time
        self.dataset = LatentDataset(cache, normalise=False)
        (buckets,) = self.dataset.buckets()
        largest = max(buckets, key=lambda name: int(np.prod(cache.bucket_shapes[name])))
        listed = {name: np.asarray(clips) for name, clips in buckets.items()}
        self._held_out = listed[largest][:held_out].tolist()
        listed[largest] = listed[largest][held_out:]
        if not any(map(len, listed.values())):
            raise UserError(f"no clip of {path} is left to train on; hold out fewer than {held_out} (data.held_out)")
        self._buckets = listed

    def batch(self, step: int, micro_batch: int, num_micro_batches: int) -> LatentBatch:
        batches = BucketBatches([self._buckets], self.size, seed=self.seed, world=num_micro_batches)
        _, keys = batches.rank_batch(step, micro_batch)
        names = tuple(self.dataset.text(key.clip, "id") for key in keys)
        return LatentBatch(torch.stack([self._latent(key.clip) for key in keys]), names, self.time)

    def held_out(self) -> list[Sample]:
        return [(self._latent(clip)[None], None) for clip in self._held_out]

    def _latent(self, clip: int) -> Tensor:
        return self.dataset.latent(clip, [(0, min(self.latents, self.dataset.shape(clip)[1]))])


def latent_statistics(data: DistillationData, teacher: Teacher) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the latents, per channel, over a few batches."""
    device = next(teacher.model.parameters()).device
    latents = [sample_of(data.batch(step, 0, 1), teacher, device)[0].movedim(1, 0).flatten(1)
               for step in range(STATISTICS_BATCHES)]
    values = torch.cat(latents, dim=1)
    return values.mean(dim=1).tolist(), values.std(dim=1).clamp_min(1e-6).tolist()
