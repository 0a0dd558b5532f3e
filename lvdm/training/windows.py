"""Training windows from latent caches: clips and images of any size and length, as a pure function of step and rank."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from odvae import AutoencoderKLODVAE
from odvae.cache.dataset import BucketBatches, LatentDataset, draw_index
from odvae.cache.reader import LatentCache
from odvae.utils.config import Config
from odvae.utils.seeding import generator

from ..model.groups import frame_positions
from .buckets import Bucket, WindowSpec, hold_out, whole_groups

logger = logging.getLogger("odvae")

CACHES = (Path("data/cache"),)


class WindowConfig(Config):
    """`cache: PATH` means the same as `caches: [PATH]`."""

    caches: tuple[Path, ...] = Field(CACHES, min_length=1)  # one or several, of one VAE
    weights: tuple[float, ...] | None = None  # of each cache's share of the samples; None: by their numbers of clips
    frames: int = Field(17, ge=1)  # video frames of a window at a clip's start, 1 + 4k: the longest training length
    history: int = Field(2, ge=0)  # groups that the group after them looks back on, in training as in a rollout
    mid_clip: float = Field(0.5, ge=0, le=1)  # share of the samples that are windows from later in the clips
    tokens: int | None = Field(None, ge=1)  # of the transformer a pass: each shape's batch is what fits, at least one
    #                                         sample; None: loop.micro_batch_size samples of any shape
    sample: bool = False  # draw from the posterior in place of its mean, anew each time; needs caches of moments
    held_out: int = Field(64, ge=0)  # clips that are evaluated; of their files none is trained on, at most a fourth of
    #                                  all clips

    @model_validator(mode="before")
    @classmethod
    def _one_cache(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "cache" not in values:
            return values
        values = dict(values)
        cache = values.pop("cache")
        if values.get("caches", CACHES) != CACHES:  # those of the default nobody gave
            raise ValueError("give cache (one) or caches (a list), not both")
        return values | {"caches": (cache,)}

    @field_validator("weights")
    @classmethod
    def _one_weight_each(cls, weights: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        caches = info.data.get("caches", weights or ())  # not there: they have a mistake of their own
        if weights is not None and (len(weights) != len(caches) or not sum(weights) > 0
                                    or not all(0 <= weight < math.inf for weight in weights)):
            raise ValueError(f"give {len(caches)}, one a cache, finite, none below 0 and some above")
        return weights


@dataclass(frozen=True)
class Windows:
    """One batch of windows, all of one shape."""

    latents: Tensor  # (B, c, T, h, w) normalised float32
    captions: tuple[str, ...]  # of the B clips; of several that a clip has, one drawn at random
    numbers: tuple[int, ...]  # of these samples among all of this step's, over all processes and passes: what is random
    #                           about a sample follows from the seed, the step and this
    positions: tuple[int, ...]  # of the T latents in time; the first is always the clip's first
    frame_rate: float  # of the videos, frames a second
    names: tuple[str, ...]  # the clips' ids

    @property
    def frames(self) -> int:
        """Latent frames of all windows together."""
        return self.latents.shape[0] * self.latents.shape[2]


class LatentWindows:
    """Caches read as windows of two kinds.

    A rollout begins at a clip's start, and later sees the first latent (the sink), the last `history` groups and the
    group it makes. Training shows both: a clip's beginning, of at most `frames` frames; and its first latent followed
    by `history` + 1 groups from anywhere later, where the clip is as long as that.

    Windows lie on the grid of groups that a rollout makes: after the first latent, whole groups. Only of a clip that is
    shorter than `frames` the last group may be a shorter one: to cut it off would make of the shortest clips images.
    An image is a clip of one latent.

    Args:
        group_size: latent frames that the transformer makes together.
        patch_size: latents' sides must be multiples of it.
        batch: samples a process and pass, where `config.tokens` does not say it.

    Attributes:
        caches: that are read.
        held_out: numbers in `dataset` of the clips that are evaluated; no clip of their files is trained on, see
            `buckets.hold_out`.

    Raises:
        UserError: a cache of another VAE; `sample` and a cache without log-variances; `frames` that are not 1 + 4k or
            not whole groups; a size that does not fit the patches.
    """

    def __init__(self, config: WindowConfig, vae: AutoencoderKLODVAE, group_size: int, patch_size: int, seed: int,
                 batch: int) -> None:
        self.config, self.vae, self.seed, self.group_size = config, vae, seed, group_size
        self.caches = [LatentCache(path, vae) for path in config.caches]
        self.dataset = LatentDataset(self.caches, normalise=False, sample=config.sample)
        self._held = hold_out(self.caches, config.held_out)
        self.held_out = self._held.shown
        self._trained = np.ones(len(self.dataset), bool)
        self._trained[self._held.clips] = False
        self._cutting = WindowSpec(whole_groups(config.frames, vae, group_size), group_size * (config.history + 1),
                                patch_size)
        self._buckets = {_key(bucket): bucket for bucket in self._cutting.buckets(self.dataset, self._trained)}
        self._fixed_size = batch
        self._samplers: dict[int, BucketBatches] = {}  # by the number of processes and passes
        for name, tokens in {bucket.name: self._tokens(bucket) for bucket in self._buckets.values()}.items():
            if config.tokens is not None and tokens > config.tokens:
                logger.warning("a window of %s latents takes %d tokens, more than windows.tokens=%d: its batches are "
                               "of one sample", name, tokens, config.tokens)
        self._sampler(1)  # report mistakes now

    def _tokens(self, bucket: Bucket) -> int:
        """Of the transformer, a window."""
        return math.prod(bucket.shape) // self._cutting.patch_size**2

    def _size(self, bucket: Bucket) -> int:
        """Samples a process and pass."""
        budget = self.config.tokens
        return self._fixed_size if budget is None else max(1, budget // self._tokens(bucket))

    def _sampler(self, num_micro_batches: int) -> BucketBatches:
        if num_micro_batches not in self._samplers:
            rows: list[dict[str, np.ndarray]] = [{} for _ in range(2 * len(self.caches))]
            for bucket in self._buckets.values():
                rows[2 * bucket.cache + bucket.later][bucket.name] = bucket.clips
            sizes = {bucket.name: self._size(bucket) for bucket in self._buckets.values()}
            self._samplers[num_micro_batches] = BucketBatches(rows, sizes, seed=self.seed, world=num_micro_batches,
                                                              weights=self._weights())
        return self._samplers[num_micro_batches]

    def _weights(self) -> list[float]:
        """Of each cache's windows from the start, and of those from later."""
        weights: list[float] = []
        for number, weight in enumerate(self.config.weights or self._clips()):
            # A cache whose clips are all too short has its share from their starts alone.
            long = any(bucket.later for bucket in self._buckets.values() if bucket.cache == number)
            later = self.config.mid_clip if long else 0.0
            weights += [weight * (1 - later), weight * later]
        return weights

    def _clips(self) -> list[int]:
        """How many clips of each cache are trained on."""
        ends = np.cumsum([len(cache) for cache in self.caches])
        return [int(trained.sum()) for trained in np.split(self._trained, ends[:-1])]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latents that most samples have."""
        samples: dict[tuple[int, int], float] = defaultdict(float)
        for group in self._sampler(1).groups:
            samples[self._buckets[group.name].shape[1:]] += group.share * group.batch
        return max(samples, key=lambda size: samples[size])

    @property
    def frame_rate(self) -> float:
        """Of the first cache's videos, frames a second."""
        return self.caches[0].header.transform.frame_rate

    def batch(self, step: int, micro_batch: int, num_micro_batches: int) -> Windows:
        """What process (or pass) `rank` of `world` sees in a step: a pure function. All see windows of one bucket."""
        sampler = self._sampler(num_micro_batches)
        group, picks = sampler.rank_batch(step, micro_batch)
        return self._read(self._buckets[sampler.groups[group].name], [pick.clip for pick in picks],
                          micro_batch * len(picks), step)

    def held_out_batches(self) -> list[Windows]:
        """The starts of the held-out clips, of the posterior's mean, the longest first. One batch a shape and cache, or
        several where it would be larger than one of training; `numbers` run on through all of them."""
        batches: list[Windows] = []
        shown = np.zeros(len(self.dataset), bool)
        shown[self.held_out] = True
        starts = [bucket for bucket in self._cutting.buckets(self.dataset, shown) if not bucket.later]
        number = 0
        for bucket in sorted(starts, key=lambda bucket: bucket.shape, reverse=True):
            size = self._size(bucket)
            for some in (bucket.clips[i : i + size].tolist() for i in range(0, len(bucket.clips), size)):
                batches.append(self._read(bucket, some, number))
                number += len(some)
        return batches

    def _read(self, bucket: Bucket, clips: Sequence[int], first: int, step: int | None = None) -> Windows:
        """A batch whose samples are numbered from `first` on; without a step nothing in it is random."""
        latents, captions, length = [], [], bucket.shape[0] - 1
        for number, clip in enumerate(clips, first):
            begin, draw = 1, None
            if step is not None and bucket.later:
                places = (self.dataset.shape(clip)[1] - 1 - length) // self.group_size + 1
                place = torch.randint(places, (), generator=generator(self.seed, "later", step, number))
                begin += self.group_size * int(place)
            if step is not None and self.config.sample:
                draw = generator(self.seed, "posterior", step, number)
            latents.append(self.dataset.latent(clip, [(0, 1), (begin, begin + length)], draw))
            said = self.dataset.captions(clip)
            captions.append(said[0 if step is None else draw_index(len(said), self.seed, "caption", step, number)])
        return Windows(latents=self.vae.normalize(torch.stack(latents)),
                       captions=tuple(captions),
                       numbers=tuple(range(first, first + len(clips))),
                       positions=frame_positions(1 + length, self.group_size, bucket.later),
                       frame_rate=self.caches[bucket.cache].header.transform.frame_rate,
                       names=tuple(self.dataset.text(clip, "id") for clip in clips))

    def describe(self) -> str:
        """For the log: the buckets with their shares, what is held out, what is left out and why."""
        held = self._held
        lines = [f"held out: {len(held.clips)} clips, all of {held.files} files; evaluated: {len(held.shown)}"]
        if self.config.held_out and not held.files:
            lines = ["nothing is held out: each file has more than a fourth of all clips"]
        groups = self._sampler(1).groups
        samples = sum(group.share * group.batch for group in groups)
        for number, (cache, clips) in enumerate(zip(self.caches, self._clips(), strict=True)):
            lines.append(f"{cache.path}: {len(cache)} clips, {len(cache) - clips} of them held out")
            mine = [(group, self._buckets[group.name]) for group in groups
                    if self._buckets[group.name].cache == number]
            for group, bucket in mine:
                kind = "from later" if bucket.later else "at the start"
                lines.append(f"  {bucket.name} latents {kind}: {len(bucket.clips)} clips, batch {group.batch}, "
                             f"{group.share:.1%} of steps, {group.share * group.batch / samples:.1%} of samples")
            seen = len(np.unique(np.concatenate([bucket.clips for _, bucket in mine]))) if mine else 0
            if seen < clips:
                why = "too short for a window from later, and windows.mid_clip=1" if mine else "the cache's weight is 0"
                lines.append(f"  {clips - seen} clips are left out: {why}")
        return "\n".join(lines)


def _key(bucket: Bucket) -> str:
    """What `BucketBatches` calls it."""
    return f"{2 * bucket.cache + bucket.later}:{bucket.name}"
