"""Random training windows of video clips, as a pure function of (seed, step, micro-batch)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..trainer.distributed import from_main_process
from ..utils.config import Config
from ..utils.errors import UserError
from ..utils.files import hash_file
from ..utils.seeding import generator
from .files import list_folder
from .manifests import ClipRef, read_manifest
from .probing import ProbeResults, probe_files
from .transforms import cover, covering, crop, resize_crop, to_planes, to_tensor
from .video.reader import VideoError, VideoInfo, count_frames, read_clip, read_image

logger = logging.getLogger("odvae")


class BucketConfig(Config):
    frames: int = Field(ge=1)  # per window, 1 + 4k; buckets of 1 frame draw from photos too
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    batch: int | None = Field(None, ge=1)  # None: the loop's
    weight: float = Field(1.0, gt=0)  # share of the steps that draw this bucket, relative to the others


class DataConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"memory_mb"})

    folder: Path = Path("data")  # videos, and photos for windows of one frame; with subfolders
    files: Path | None = None  # a .jsonl, .csv or .parquet list instead of the folder; see odvae.data.manifests
    columns: tuple[str, ...] = ()  # of a list, where names differ: [path=video, start=begin]
    frames: int = Field(17, ge=1)  # per window, 1 + 4k
    frame_rate: float = Field(8.0, gt=0)  # frames per second of the windows
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    buckets: tuple[BucketConfig, ...] = ()  # several lengths and sizes, instead of frames, height and width
    crop: Literal["centre", "random"] = "centre"  # of a picture scaled to cover height x width
    zoom: tuple[float, float] = (1.0, 1.0)  # range of a further scale factor, log-uniform, drawn for each window
    flip: bool = False  # mirror half of the windows horizontally
    held_out: int = Field(16, ge=0)  # clips for evaluation, the first by name; none of their files is trained on
    memory_mb: int = Field(4096, ge=0)  # MiB of decoded clips that are kept in memory

    @field_validator("zoom")
    @classmethod
    def _zoom_is_a_range(cls, zoom: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= zoom[0] <= zoom[1] < math.inf:
            raise ValueError("must be [min, max] with 1 <= min <= max: below 1 no picture covers the window")
        return zoom

    def windows(self) -> tuple[BucketConfig, ...]:
        """Return the buckets, or the one given by frames, height and width."""
        return self.buckets or (BucketConfig(frames=self.frames, height=self.height, width=self.width),)


@dataclass(frozen=True)
class VideoBatch:
    video: Tensor  # uint8 (B, 3, T, H, W)
    names: tuple[str, ...]  # of the files, with each window's start in s

    @property
    def frames(self) -> int:
        """Number of frames in all windows together."""
        return self.video.shape[0] * self.video.shape[2]


@dataclass(frozen=True)
class Clip:
    path: Path
    start: float  # s, of its usable span
    frames: int  # of the span, at the config's frame rate; 1 for a photo
    size: tuple[int, int] | None  # pixels (height, width), upright; None for a photo, which is read when drawn


class VideoClipDataset:
    """The clips of a folder or list that are long enough, decoded once and kept in memory up to `memory_mb`.

    Evaluation uses the longest and largest bucket; the first clips that fit it are held out, with all of their files.

    Args:
        probed: probe results by file, to share among datasets; `probe_files`
        reserved: files that must not be trained on; if given, no others are held out.

    Attributes:
        clips: the usable ones.
        set_aside: (file, reason, which names the file) of the others.
        held_out_indices: of the held-out clips in `clips`.
        reserved: the files of the held-out clips, or those given, and all files with the same content.
    """

    def __init__(self, config: DataConfig, probed: ProbeResults | None = None,
                 reserved: frozenset[Path] | None = None) -> None:
        self.config, self.buckets = config, config.windows()
        self.clips: list[Clip] = []
        self.set_aside: list[tuple[Path, str]] = []
        self._probed = {} if probed is None else probed
        self._decoded: dict[tuple[int, int, int], np.ndarray] = {}
        self._budget = config.memory_mb * 2**20
        self._shortest = min(bucket.frames for bucket in self.buckets)
        self._probe_clips()
        self.eval_bucket = max(self.buckets, key=lambda b: (b.frames, b.height * b.width))
        long_enough = [i for i, clip in enumerate(self.clips) if clip.frames >= self.eval_bucket.frames]
        self.held_out_indices = self._hold_out(long_enough) if reserved is None else []
        files = {self.clips[i].path for i in self.held_out_indices} if reserved is None else reserved
        self.reserved = from_main_process(lambda: self._with_duplicates(files))
        if self.held_out_indices:
            count = sum(clip.path in self.reserved for clip in self.clips)
            held_out = len(self.held_out_indices)
            logger.info("held out: %d clips, and %d more of their %d files", held_out, count - held_out,
                        len(self.reserved))
        training = [i for i, clip in enumerate(self.clips) if clip.path not in self.reserved]
        self._training = {b: [i for i in training if self.clips[i].frames >= b.frames] for b in self.buckets}
        for bucket, fit in self._training.items():
            if not fit:
                raise UserError(f"no clip of {self.where} is left to train windows of {bucket.frames} frames on, at "
                                f"{config.frame_rate:g} fps; hold out fewer (data.held_out), or leave this length out")

    @property
    def where(self) -> Path:
        return self.config.files or self.config.folder

    def _probe_clips(self) -> None:
        listed = from_main_process(self._list)
        paths = dict.fromkeys(ref.path for ref in listed)
        self._probed |= probe_files([path for path in paths if path not in self._probed])
        for ref in listed:
            self._add(ref)
        if self.set_aside:
            logger.warning("set aside %d of %d clips, the first: %s", len(self.set_aside),
                           len(self.set_aside) + len(self.clips), self.set_aside[0][1])
        for note, count in Counter(note for info in self._probed.values() if isinstance(info, VideoInfo)
                                   for note in info.notes).items():
            logger.info("%s: %d files", note, count)
        if not self.clips:
            raise UserError(f"no clip in {self.where} has {self._shortest} frames at {self.config.frame_rate} fps; "
                            f"the first was set aside because: {self.set_aside[0][1]}")

    def _list(self) -> list[ClipRef]:
        config = self.config
        return list(read_manifest(config.files, config.columns) if config.files is not None else
                    list_folder(config.folder, images=self._shortest == 1, columns=config.columns))

    def _add(self, listed: ClipRef) -> None:
        path = listed.path
        info = self._probed[path]
        if isinstance(info, VideoError):
            self.set_aside.append((path, str(info)))
            return
        if info is None and self._shortest > 1:
            self.set_aside.append((path, f"{path} is a photo, and no bucket has windows of one frame"))
            return
        if info is None:
            self.clips.append(Clip(path, 0.0, 1, None))
            return
        length = count_frames(min(info.duration, listed.end) - listed.start, self.config.frame_rate)
        if length < self._shortest:
            self.set_aside.append((path, f"{path} has {length} frames at {self.config.frame_rate} fps, fewer than the "
                                         f"{self._shortest} of a window (data.frames)"))
            return
        self.clips.append(Clip(path, listed.start, length, (info.height, info.width)))

    def _hold_out(self, long_enough: list[int]) -> list[int]:
        """Return the first clips, but none of the last file, so that something is left to train on."""
        files = list(dict.fromkeys(self.clips[i].path for i in long_enough))
        return [i for i in long_enough if self.clips[i].path != files[-1]][:self.config.held_out]

    def _with_duplicates(self, files: Set[Path]) -> frozenset[Path]:
        """Add all files with the same content to `files`."""
        sizes = {path.stat().st_size for path in files}
        same_size = {clip.path for clip in self.clips if clip.path not in files and clip.path.stat().st_size in sizes}
        contents = {hash_file(path) for path in files} if same_size else set()
        return frozenset(files | {path for path in same_size if hash_file(path) in contents})

    def __len__(self) -> int:
        return len(self.clips)

    def clear_cache(self) -> None:
        """Free the memory of decoded clips; they are decoded again when drawn."""
        self._budget += sum(video.nbytes for video in self._decoded.values())
        self._decoded.clear()

    def _pixels(self, index: int, start: int, bucket: BucketConfig) -> np.ndarray:
        """Read `bucket.frames` frames of a clip from frame `start`, as large as the largest zoom needs and the clip
        allows, and cropped if crops are centred: uint8 (T, H, W, 3)."""
        clip, rate = self.clips[index], self.config.frame_rate
        height, width = (round(side * self.config.zoom[1]) for side in (bucket.height, bucket.width))

        def scale(video: np.ndarray) -> np.ndarray:
            (h, w), (min_h, min_w) = video.shape[1:3], (bucket.height, bucket.width)
            to_h, to_w = min(height, max(h, min_h)), min(width, max(w, min_w))
            video = cover(video, to_h, to_w)
            return crop(video, to_h, to_w) if self.config.crop == "centre" else video

        if clip.size is None:
            return scale(read_image(clip.path))
        key = (index, bucket.height, bucket.width)
        if key not in self._decoded:
            size = (height, width) if self.config.crop == "centre" else covering(clip.size, height, width)
            if clip.frames * size[0] * size[1] * 3 > self._budget:
                return read_clip(clip.path, clip.start + start / rate, bucket.frames, rate, scale)
            self._decoded[key] = read_clip(clip.path, clip.start, clip.frames, rate, scale)
            self._budget -= self._decoded[key].nbytes
        return self._decoded[key][start : start + bucket.frames]

    def bucket(self, step: int, seed: int) -> BucketConfig:
        """Return the bucket of a step, the same in all processes."""
        weights = torch.tensor([bucket.weight for bucket in self.buckets])
        return self.buckets[int(torch.multinomial(weights, 1, generator=generator(seed, "bucket", step)))]

    def batch(self, step: int, micro_batch: int, size: int, seed: int) -> VideoBatch:
        """Draw windows of `size` training clips (or of the bucket's own batch size) at random."""
        bucket, rng = self.bucket(step, seed), generator(seed, "windows", step, micro_batch)
        fit, size = self._training[bucket], bucket.batch or size
        drawn = [fit[i] for i in torch.randint(0, len(fit), (size,), generator=rng).tolist()]
        starts = [int(torch.randint(0, self.clips[i].frames - bucket.frames + 1, (), generator=rng)) for i in drawn]
        positions = torch.rand((size, 2), generator=generator(seed, "crop", step, micro_batch)).tolist()
        flips = torch.rand(size, generator=generator(seed, "flip", step, micro_batch)).lt(0.5).tolist()
        zooms = torch.rand(size, generator=generator(seed, "zoom", step, micro_batch)).tolist()
        windows = []
        for i, start, position, flip, zoom in zip(drawn, starts, positions, flips, zooms, strict=True):
            pixels = self._zoom(self._pixels(i, start, bucket), bucket, zoom, position)
            windows.append(to_planes(pixels[:, :, ::-1] if flip and self.config.flip else pixels))
        seconds = [self.clips[i].start + start / self.config.frame_rate for i, start in zip(drawn, starts, strict=True)]
        return VideoBatch(torch.stack(windows), tuple(f"{self.clips[i].path} from {second:.2f} s"
                                                      for i, second in zip(drawn, seconds, strict=True)))

    def _zoom(self, pixels: np.ndarray, bucket: BucketConfig, draw: float, position: Sequence[float]) -> np.ndarray:
        """Crop a window from the result of `_pixels`. `draw`, 0 to 1, gives the zoom on a logarithmic scale."""
        low, high = self.config.zoom
        possible = min(pixels.shape[1] / bucket.height, pixels.shape[2] / bucket.width)
        share = max(1.0, possible / (low * (high / low) ** draw))
        y, x = position
        window = crop(pixels, round(bucket.height * share), round(bucket.width * share), (y, x))
        return resize_crop(window, bucket.height, bucket.width)

    def held_out(self) -> list[Tensor]:
        """Return the first window of each held-out clip in the largest bucket, (3, T, H, W) in [-1, 1], centred."""
        bucket = self.eval_bucket
        return [to_tensor(resize_crop(self._pixels(i, 0, bucket), bucket.height, bucket.width))
                for i in self.held_out_indices]
