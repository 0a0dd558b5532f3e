"""Random windows of training clips, as a pure function of (seed, step, rank)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..utils.config import Config
from ..utils.errors import UserError
from ..utils.files import hash_file
from ..utils.progress import track
from ..utils.seeding import generator
from .files import is_image, list_folder
from .manifests import ClipRef, read_manifest
from .transforms import cover, covering, crop, resize_crop, to_tensor
from .video.image import is_animated
from .video.reader import VideoError, VideoInfo, count_frames, probe, read_clip, read_image

logger = logging.getLogger("odvae")


class BucketConfig(Config):
    frames: int = Field(ge=1)  # a window, 1 + 4k; buckets of 1 frame draw from photos too
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    batch: int | None = Field(None, ge=1)  # none: the loop's
    weight: float = Field(1.0, gt=0)  # the share of steps that draw this bucket, relative to the others


class DataConfig(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"memory_mb"})

    folder: Path = Path("data")  # videos, and photos where windows of one frame are drawn; folders inside count too
    files: Path | None = None  # a .jsonl, .csv or .parquet list in place of the folder; see odvae.data.manifests
    columns: tuple[str, ...] = ()  # of a list, where names differ: [path=video, start=begin]
    frames: int = Field(17, ge=1)  # a window, 1 + 4k
    frame_rate: float = Field(8.0, gt=0)  # frames a second that windows are sampled at
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    buckets: tuple[BucketConfig, ...] = ()  # several lengths and sizes, in place of frames, height and width
    crop: Literal["centre", "random"] = "centre"  # of a picture scaled until it just covers height x width
    zoom: tuple[float, float] = (1.0, 1.0)  # that picture is larger by a factor from here, log-uniform, one a window
    flip: bool = False  # half of the windows left to right
    held_out: int = Field(16, ge=0)  # clips, the first by name, that are evaluated; none of their files is trained on
    memory_mb: int = Field(4096, ge=0)  # decoded clips that are kept in memory

    @field_validator("zoom")
    @classmethod
    def _zoom_is_a_range(cls, zoom: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= zoom[0] <= zoom[1] < math.inf:
            raise ValueError("must be [least, most] with 1 <= least <= most: below 1 no picture covers the window")
        return zoom

    def windows(self) -> tuple[BucketConfig, ...]:
        """The buckets, or the one that frames, height and width describe."""
        return self.buckets or (BucketConfig(frames=self.frames, height=self.height, width=self.width),)


@dataclass(frozen=True)
class VideoBatch:
    video: Tensor  # (B, 3, T, H, W) in [-1, 1]
    names: tuple[str, ...]  # of the files, with the second where a window begins

    @property
    def frames(self) -> int:
        """Of all windows together."""
        return self.video.shape[0] * self.video.shape[2]


@dataclass(frozen=True)
class Clip:
    path: Path
    start: float  # s, where its usable span begins
    frames: int  # of the span, at the config's frame rate; 1 for a photo
    size: tuple[int, int] | None  # pixels (height, width), upright; None for a photo, which is read when it is drawn


class VideoClipDataset:
    """The clips of a folder or list that are long enough, decoded once and kept as long as `memory_mb` allows.

    Evaluation takes the longest and largest bucket; held out are the first clips that fit it, and all of their files.

    Args:
        probed: what is known of files, shared by several of these; opening a file reads it to its end.
        reserved: files that must not be trained on; with these given, no others are held out.

    Attributes:
        clips: the usable ones.
        set_aside: (file, reason, which names the file) of the others.
        held: those of `clips` that are held out.
        reserved: the files of `held`, or those given, and whatever files have the same content.
    """

    def __init__(self, config: DataConfig, probed: dict[Path, VideoInfo | VideoError] | None = None,
                 reserved: frozenset[Path] | None = None) -> None:
        self.config, self.buckets = config, config.windows()
        self.clips: list[Clip] = []
        self.set_aside: list[tuple[Path, str]] = []
        self._probed = {} if probed is None else probed
        self._decoded: dict[tuple[int, int, int], np.ndarray] = {}
        self._budget = config.memory_mb * 2**20
        self._shortest = min(bucket.frames for bucket in self.buckets)
        self._look()
        self.shown = max(self.buckets, key=lambda b: (b.frames, b.height * b.width))
        long_enough = [i for i, clip in enumerate(self.clips) if clip.frames >= self.shown.frames]
        self.held = self._hold_out(long_enough) if reserved is None else []
        self.reserved = self._with_copies({self.clips[i].path for i in self.held} if reserved is None else reserved)
        if self.held:
            count = sum(clip.path in self.reserved for clip in self.clips)
            logger.info("held out: %d clips, and %d more of their %d files", len(self.held), count - len(self.held),
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

    def _look(self) -> None:
        listed = read_manifest(self.config.files, self.config.columns) if self.config.files is not None else \
            list_folder(self.config.folder, images=self._shortest == 1, columns=self.config.columns)
        for one in track(listed, "look at clips", "clip"):
            self._add(one)
        if self.set_aside:
            logger.warning("set aside %d of %d clips, the first: %s", len(self.set_aside),
                           len(self.set_aside) + len(self.clips), self.set_aside[0][1])
        for note, count in Counter(note for info in self._probed.values() if isinstance(info, VideoInfo)
                                   for note in info.notes).items():
            logger.info("%s: %d files", note, count)
        if not self.clips:
            raise UserError(f"no clip in {self.where} has {self._shortest} frames at {self.config.frame_rate} fps; "
                            f"the first was set aside because: {self.set_aside[0][1]}")

    def _add(self, listed: ClipRef) -> None:
        if is_image(listed.path) and not is_animated(listed.path):
            self._add_photo(listed.path)
            return
        if listed.path not in self._probed:
            try:
                self._probed[listed.path] = probe(listed.path)
            except VideoError as error:
                self._probed[listed.path] = error
        info = self._probed[listed.path]
        if isinstance(info, VideoError):
            self.set_aside.append((listed.path, str(info)))
            return
        length = count_frames(min(info.duration, listed.end) - listed.start, self.config.frame_rate)
        if length < self._shortest:
            self.set_aside.append((listed.path, f"{listed.path} has {length} frames at {self.config.frame_rate} fps, "
                                                f"shorter than the {self._shortest} asked for (data.frames)"))
            return
        self.clips.append(Clip(listed.path, listed.start, length, (info.height, info.width)))

    def _add_photo(self, path: Path) -> None:
        if self._shortest > 1:
            self.set_aside.append((path, f"{path} is a photo, and no window of one frame is asked for"))
            return
        try:
            read_image(path)
        except VideoError as error:
            self.set_aside.append((path, str(error)))
        else:
            self.clips.append(Clip(path, 0.0, 1, None))

    def _hold_out(self, long_enough: list[int]) -> list[int]:
        """The first clips. Of one file at least there are none, so that something is left to train on."""
        files = list(dict.fromkeys(self.clips[i].path for i in long_enough))
        return [i for i in long_enough if self.clips[i].path != files[-1]][:self.config.held_out]

    def _with_copies(self, files: Set[Path]) -> frozenset[Path]:
        """Some files, and whatever files have the same content."""
        sizes = {path.stat().st_size for path in files}
        alike = {clip.path for clip in self.clips if clip.path not in files and clip.path.stat().st_size in sizes}
        contents = {hash_file(path) for path in files} if alike else set()
        return frozenset(files | {path for path in alike if hash_file(path) in contents})

    def __len__(self) -> int:
        return len(self.clips)

    def clear_cache(self) -> None:
        """Give the memory of decoded clips back; they are read again when they are drawn again."""
        self._budget += sum(video.nbytes for video in self._decoded.values())
        self._decoded.clear()

    def _pixels(self, index: int, start: int, bucket: BucketConfig) -> np.ndarray:
        """`bucket.frames` frames of a clip from frame `start`, as large as the largest zoom needs and the clip has, and
        cropped where crops are in the centre: uint8 (T, H, W, 3)."""
        clip, rate = self.clips[index], self.config.frame_rate
        height, width = (round(side * self.config.zoom[1]) for side in (bucket.height, bucket.width))

        def scaled(video: np.ndarray) -> np.ndarray:
            (h, w), (least_h, least_w) = video.shape[1:3], (bucket.height, bucket.width)
            to_h, to_w = min(height, max(h, least_h)), min(width, max(w, least_w))
            video = cover(video, to_h, to_w)
            return crop(video, to_h, to_w) if self.config.crop == "centre" else video

        if clip.size is None:
            return scaled(read_image(clip.path))
        key = (index, bucket.height, bucket.width)
        if key not in self._decoded:
            size = (height, width) if self.config.crop == "centre" else covering(clip.size, height, width)
            if clip.frames * size[0] * size[1] * 3 > self._budget:
                return read_clip(clip.path, clip.start + start / rate, bucket.frames, rate, scaled)
            self._decoded[key] = read_clip(clip.path, clip.start, clip.frames, rate, scaled)
            self._budget -= self._decoded[key].nbytes
        return self._decoded[key][start : start + bucket.frames]

    def bucket(self, step: int, seed: int) -> BucketConfig:
        """The bucket of a step, in all processes."""
        weights = torch.tensor([bucket.weight for bucket in self.buckets])
        return self.buckets[int(torch.multinomial(weights, 1, generator=generator(seed, "bucket", step)))]

    def batch(self, step: int, micro_batch: int, size: int, seed: int) -> VideoBatch:
        """Windows of `size` training clips (or as many as the bucket says) drawn at random."""
        bucket, rng = self.bucket(step, seed), generator(seed, "windows", step, micro_batch)
        fit, size = self._training[bucket], bucket.batch or size
        drawn = [fit[i] for i in torch.randint(0, len(fit), (size,), generator=rng).tolist()]
        starts = [int(torch.randint(0, self.clips[i].frames - bucket.frames + 1, (), generator=rng)) for i in drawn]
        places = torch.rand((size, 2), generator=generator(seed, "crop", step, micro_batch)).tolist()
        flips = torch.rand(size, generator=generator(seed, "flip", step, micro_batch)).lt(0.5).tolist()
        zooms = torch.rand(size, generator=generator(seed, "zoom", step, micro_batch)).tolist()
        windows = []
        for i, start, (y, x), flip, zoom in zip(drawn, starts, places, flips, zooms, strict=True):
            pixels = self._zoomed(self._pixels(i, start, bucket), bucket, zoom, (y, x))
            windows.append(to_tensor(pixels[:, :, ::-1] if flip and self.config.flip else pixels))
        begins = [self.clips[i].start + start / self.config.frame_rate for i, start in zip(drawn, starts, strict=True)]
        return VideoBatch(torch.stack(windows), tuple(f"{self.clips[i].path} from {begin:.2f} s"
                                                      for i, begin in zip(drawn, begins, strict=True)))

    def _zoomed(self, pixels: np.ndarray, bucket: BucketConfig, draw: float, place: tuple[float, float]) -> np.ndarray:
        """A window from what `_pixels` gives. `draw`, 0 to 1, says the zoom on a logarithmic scale."""
        least, most = self.config.zoom
        possible = min(pixels.shape[1] / bucket.height, pixels.shape[2] / bucket.width)
        share = max(1.0, possible / (least * (most / least) ** draw))
        part = crop(pixels, round(bucket.height * share), round(bucket.width * share), place)
        return resize_crop(part, bucket.height, bucket.width)

    def held_out(self) -> list[Tensor]:
        """The first window of each held-out clip in the largest bucket, (3, T, H, W) in [-1, 1], centred."""
        return [to_tensor(resize_crop(self._pixels(i, 0, self.shown), self.shown.height, self.shown.width))
                for i in self.held]
