"""Training windows from latent caches: clips and images of any size and length, as a pure function of the step
and the micro-batch."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from odvae import AutoencoderKLODVAE
from odvae.cache.dataset import BucketBatches, LatentDataset, draw_index
from odvae.cache.order import WINDOW, ClipOrder, WindowShuffle
from odvae.cache.prefetch import ShardPrefetcher
from odvae.cache.reader import LatentCache
from odvae.cache.shard_cache import SIZE, shard_cache
from odvae.utils.config import Config
from odvae.utils.errors import path_or_url
from odvae.utils.format import format_bytes
from odvae.utils.seeding import generator

from ..model.groups import frame_positions
from .buckets import Bucket, WindowSpec, hold_out, window_latents

logger = logging.getLogger("odvae")

CACHES = (Path("data/cache"),)


# A folder, or a URL of fsspec.
CachePath = Annotated[Path | str, BeforeValidator(lambda path: path_or_url(path) if isinstance(path, str) else path)]


class WindowConfig(Config):
    """`cache: PATH` means the same as `caches: [PATH]`."""

    caches: tuple[CachePath, ...] = Field(CACHES, min_length=1)  # folders or URLs (s3://...), of the same VAE
    shard_window: int = Field(WINDOW, ge=1)  # shards among which clips are shuffled, of caches at URLs and very large
    #                                          ones; others are shuffled as a whole
    weights: tuple[float, ...] | None = None  # each cache's share of the samples; None: by number of clips
    frames: int = Field(17, ge=1)  # video frames of a window at a clip's start, 1 + 4k: the longest training length
    history: int = Field(2, ge=0)  # past groups that a group attends to, in training as in a rollout
    mid_clip: float = Field(0.5, ge=0, le=1)  # share of the samples that are windows from anywhere in the clips
    tokens: int | None = Field(None, ge=1)  # of the transformer per micro-batch, which has as many samples of a shape
    #                                         as fit, at least one; None: loop.micro_batch_size samples of any shape
    sample: bool = False  # draw from the posterior instead of its mean, anew each time; needs caches of moments
    held_out: int = Field(64, ge=0)  # clips that are evaluated; their files are not trained on, at most a quarter of
    #                                  all clips

    @model_validator(mode="before")
    @classmethod
    def _one_cache(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "cache" not in values:
            return values
        values = dict(values)
        cache = values.pop("cache")
        if values.get("caches", CACHES) != CACHES:  # the default was not given by the user
            raise ValueError("give cache (one) or caches (a list), not both")
        return values | {"caches": (cache,)}

    @field_validator("weights")
    @classmethod
    def _one_weight_each(cls, weights: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        caches = info.data.get("caches", weights or ())  # missing: they have an error of their own
        if weights is not None and (len(weights) != len(caches) or not sum(weights) > 0
                                    or not all(0 <= weight < math.inf for weight in weights)):
            raise ValueError(f"give {len(caches)}, one per cache, finite, none below 0 and some above")
        return weights


@dataclass(frozen=True)
class Windows:
    """One batch of windows, all of one shape."""

    latents: Tensor  # (B, c, T, h, w) normalised float32
    captions: tuple[str, ...]  # of the B clips; one of a clip's captions, drawn at random
    sample_indices: tuple[int, ...]  # among all samples of the step, over all processes and micro-batches: what is
    #                                  random about a sample is a function of the seed, the step and this
    positions: tuple[int, ...]  # of the T latents in time; the first is always the clip's first
    frame_rate: float  # of the videos, frames per second
    names: tuple[str, ...]  # the clips' IDs

    @property
    def frames(self) -> int:
        """Latent frames of all windows."""
        return self.latents.shape[0] * self.latents.shape[2]


class LatentWindows:
    """Latent caches as two kinds of windows.

    A rollout begins at a clip's start, and later sees the first latent (the sink), the last `history` groups and the
    group it generates. Training shows both: a clip's start, of at most `frames` frames; and, if the clip is long
    enough, mid-clip windows of its first latent followed by `history` + 1 groups from anywhere in it.

    Windows are aligned with the groups of a rollout: after the first latent, whole groups. Only in a clip that is
    shorter than `frames` the last group may be partial: without it the shortest clips would be images. An image is a
    clip of one latent.

    Args:
        group_size: latent frames that the transformer generates together.
        patch_size: latents' sides must be multiples of it.
        batch: samples per micro-batch, unless `config.tokens` decides.

    Attributes:
        caches: the caches.
        held_out: indices in `dataset` of the clips that are evaluated; no clip of their files is trained on, see
            `buckets.hold_out`.

    Raises:
        UserError: a cache of another VAE; `sample` with a cache without log-variances; `frames` that are not 1 + 4k or
            not whole groups; a size that is not a multiple of the patch size.
    """

    def __init__(self, config: WindowConfig, vae: AutoencoderKLODVAE, group_size: int, patch_size: int, seed: int,
                 batch: int) -> None:
        self.config, self.vae, self.seed, self.group_size = config, vae, seed, group_size
        self.caches = [LatentCache(path, vae) for path in config.caches]
        self.dataset = LatentDataset(self.caches, normalise=False, sample=config.sample)
        self._held_out = hold_out(self.caches, config.held_out)
        self.held_out = self._held_out.evaluated
        self._spec = WindowSpec(window_latents(config.frames, vae, group_size), group_size * (config.history + 1),
                                patch_size)
        self._buckets = {_key(bucket): bucket for bucket in
                         self._spec.buckets(self.dataset, self._held_out, config.shard_window)}
        self._batch = batch
        self._prefetchers: dict[tuple[int, int], ShardPrefetcher] = {}  # by micro-batch and their number
        self._samplers: dict[int, BucketBatches] = {}  # by the number of micro-batches
        for name, tokens in {bucket.name: self._tokens(bucket) for bucket in self._buckets.values()}.items():
            if config.tokens is not None and tokens > config.tokens:
                logger.warning("a window of %s latents has %d tokens, more than windows.tokens=%d: its batches have "
                               "one sample", name, tokens, config.tokens)
        self._sampler(1)  # report errors now

    def _tokens(self, bucket: Bucket) -> int:
        """Tokens of a window in the transformer."""
        return math.prod(bucket.shape) // self._spec.patch_size**2

    def _size(self, bucket: Bucket) -> int:
        """Samples per micro-batch."""
        budget = self.config.tokens
        return self._batch if budget is None else max(1, budget // self._tokens(bucket))

    def _sampler(self, num_micro_batches: int) -> BucketBatches:
        if num_micro_batches not in self._samplers:
            rows: list[dict[str, np.ndarray | ClipOrder]] = [{} for _ in range(2 * len(self.caches))]
            for bucket in self._buckets.values():
                rows[2 * bucket.cache + bucket.mid_clip][bucket.name] = bucket.clips
            sizes = {bucket.name: self._size(bucket) for bucket in self._buckets.values()}
            self._samplers[num_micro_batches] = BucketBatches(rows, sizes, seed=self.seed, world=num_micro_batches,
                                                              weights=self._weights())
        return self._samplers[num_micro_batches]

    def _weights(self) -> list[float]:
        """The weights of each cache's windows at the start, and of its mid-clip windows."""
        weights: list[float] = []
        for number, weight in enumerate(self.config.weights or self._clips()):
            # A cache whose clips are all too short has only windows at their starts.
            long = any(bucket.mid_clip for bucket in self._buckets.values() if bucket.cache == number)
            mid_clip = self.config.mid_clip if long else 0.0
            weights += [weight * (1 - mid_clip), weight * mid_clip]
        return weights

    def _clips(self) -> list[int]:
        """The number of clips of each cache that are trained on."""
        return [len(cache) - len(self._held_out.of(self.dataset.first(number), len(cache)))
                for number, cache in enumerate(self.caches)]

    @property
    def size(self) -> tuple[int, int]:
        """The most frequent (h, w) of the samples' latents."""
        samples: dict[tuple[int, int], float] = defaultdict(float)
        for group in self._sampler(1).groups:
            samples[self._buckets[group.name].shape[1:]] += group.share * group.batch
        return max(samples, key=lambda size: samples[size])

    def largest_batch(self) -> tuple[int, tuple[int, int, int]]:
        """Return the samples of a micro-batch with the most tokens, and the shape (T, h, w) of their latents."""
        sizes = [(self._size(bucket), bucket.shape) for bucket in self._buckets.values()]
        return max(sizes, key=lambda size: (size[0] * math.prod(size[1]), size[1]))

    @property
    def frame_rate(self) -> float:
        """Frames per second of the first cache's videos."""
        return self.caches[0].header.transform.frame_rate

    def batch(self, step: int, micro_batch: int, num_micro_batches: int) -> Windows:
        """Read micro-batch `micro_batch` of a step: a pure function. All micro-batches of a step have one bucket."""
        sampler = self._sampler(num_micro_batches)
        group, picks = sampler.rank_batch(step, micro_batch)
        if not all(cache.is_local for cache in self.caches):
            self._prefetcher(micro_batch, num_micro_batches).advance(step)
        return self._read(self._buckets[sampler.groups[group].name], [pick.clip for pick in picks],
                          micro_batch * len(picks), step)

    def _prefetcher(self, micro_batch: int, num_micro_batches: int) -> ShardPrefetcher:
        key, sampler = (micro_batch, num_micro_batches), self._sampler(num_micro_batches)
        if key not in self._prefetchers:
            self._prefetchers[key] = ShardPrefetcher(
                self.dataset, lambda step: [pick.clip for pick in sampler.rank_batch(step, micro_batch)[1]])
        return self._prefetchers[key]

    def held_out_batches(self) -> list[Windows]:
        """Read the starts of the held-out clips, from the posterior's mean, the longest first. There is one batch per
        shape and cache, or several of training's size; `sample_indices` count through all of them."""
        batches: list[Windows] = []
        starts = self._spec.evaluated(self.dataset, self._held_out)
        first = 0
        for bucket in sorted(starts, key=lambda bucket: bucket.shape, reverse=True):
            size = self._size(bucket)
            listed: Any = bucket.clips
            for clips in (listed[i : i + size].tolist() for i in range(0, len(listed), size)):
                batches.append(self._read(bucket, clips, first))
                first += len(clips)
        return batches

    def _read(self, bucket: Bucket, clips: Sequence[int], first: int, step: int | None = None) -> Windows:
        """Read a batch whose samples are numbered from `first` on; without a step nothing in it is random."""
        latents, captions, length = [], [], bucket.shape[0] - 1
        for index, clip in enumerate(clips, first):
            begin, rng = 1, None
            if step is not None and bucket.mid_clip:
                positions = (self.dataset.shape(clip)[1] - 1 - length) // self.group_size + 1
                position = torch.randint(positions, (), generator=generator(self.seed, "later", step, index))
                begin += self.group_size * int(position)
            if step is not None and self.config.sample:
                rng = generator(self.seed, "posterior", step, index)
            latents.append(self.dataset.latent(clip, [(0, 1), (begin, begin + length)], rng))
            choices = self.dataset.captions(clip)
            captions.append(choices[0 if step is None else draw_index(len(choices), self.seed, "caption", step, index)])
        return Windows(latents=self.vae.normalize(torch.stack(latents)),
                       captions=tuple(captions),
                       sample_indices=tuple(range(first, first + len(clips))),
                       positions=frame_positions(1 + length, self.group_size, bucket.mid_clip),
                       frame_rate=self.caches[bucket.cache].header.transform.frame_rate,
                       names=tuple(self.dataset.text(clip, "id") for clip in clips))

    def describe(self) -> str:
        """Describe for the log the buckets with their shares, what is held out, what is left out and why."""
        held_out = self._held_out
        lines = [f"held out: all {len(held_out.clips)} clips of {held_out.files} files; "
                 f"evaluated: {len(held_out.evaluated)}"]
        if self.config.held_out and not held_out.files:
            lines = ["nothing is held out: each file has more than a quarter of all clips"]
        groups = self._sampler(1).groups
        samples = sum(group.share * group.batch for group in groups)
        for number, (cache, clips) in enumerate(zip(self.caches, self._clips(), strict=True)):
            lines.append(f"{cache.path}: {len(cache)} clips, {len(cache) - clips} of them held out")
            pairs = [(group, self._buckets[group.name]) for group in groups
                     if self._buckets[group.name].cache == number]
            for group, bucket in pairs:
                kind = "mid-clip" if bucket.mid_clip else "at the start"
                lines.append(f"  {bucket.name} latents {kind}: {len(bucket.clips)} clips, batch {group.batch}, "
                             f"{group.share:.1%} of steps, {group.share * group.batch / samples:.1%} of samples")
            lines += self._describe_windows(cache, [bucket for _, bucket in pairs])
            # Every clip has a window at its start, and a long one has mid-clip windows too.
            used = (sum(len(bucket.clips) for _, bucket in pairs if not bucket.mid_clip)
                    or sum(len(bucket.clips) for _, bucket in pairs))
            if used < clips:
                reason = ("too short for mid-clip windows, and windows.mid_clip=1" if pairs
                          else "the cache's weight is 0")
                lines.append(f"  {clips - used} clips are left out: {reason}")
        return "\n".join(lines)

    def _describe_windows(self, cache: LatentCache, buckets: list[Bucket]) -> list[str]:
        """Describe how the clips of a cache are shuffled, if not as a whole."""
        orders = [bucket.clips for bucket in buckets if isinstance(bucket.clips, WindowShuffle)]
        if not orders:
            return []
        worst, size = max(order.clustering for order in orders), sum(order.window_bytes for order in orders)
        lines = [f"  shuffled within {self.config.shard_window} shards at a time (windows.shard_window): two clips of "
                 f"a shard meet in a batch up to {worst:.3g} times as often as in a full shuffle"]
        if not cache.is_local:
            limit = shard_cache().limit
            lines.append(f"  up to {format_bytes(size)} of shards are in use at a time; {shard_cache().folder} holds "
                         f"{format_bytes(limit)}")
            if size > limit / 2:
                logger.warning("%s: if the shards in use do not fit in half of the shard cache, they are fetched "
                               "again and again; set %s to more, or windows.shard_window to less", cache.path, SIZE)
        return lines


def _key(bucket: Bucket) -> str:
    """The bucket's name in `BucketBatches`."""
    return f"{2 * bucket.cache + bucket.mid_clip}:{bucket.name}"
