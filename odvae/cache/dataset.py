"""Latents for training: a map-style dataset over caches, and batches as a pure function of (seed, step, rank)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..model.outputs import DiagonalGaussianDistribution
from ..utils.errors import UserError
from ..utils.seeding import generator
from .order import WINDOW, ClipOrder, WindowShuffle, as_order
from .reader import LatentCache


class SampleKey(NamedTuple):
    """One clip in one epoch."""

    clip: int
    epoch: int = 0


class LatentDataset(Dataset[dict[str, Any]]):
    """The clips of one cache or of several, one after the other.

    An item is {"latents": (c, t, h, w) float32, "caption": str, "id": str}. The key is a clip's index, or a
    `SampleKey`, whose epoch determines which of the clip's captions, and which sample of the posterior, are drawn.

    Args:
        caches: of one VAE.
        normalise: by the measured mean and standard deviation per channel of the first cache, so that latents mean the
            same in all caches.
        sample: draw a new sample of the posterior each epoch, instead of its mean. Needs caches that hold moments.
        seed: of these draws.

    Raises:
        UserError: caches of different VAEs; `sample` and a cache without log-variances.
    """

    def __init__(self, caches: LatentCache | Sequence[LatentCache], *, normalise: bool = True, sample: bool = False,
                 seed: int = 0) -> None:
        self.caches = [caches] if isinstance(caches, LatentCache) else list(caches)
        first = self.caches[0]
        for cache in self.caches:
            if cache.header.vae.fingerprint != first.header.vae.fingerprint:
                raise UserError(f"{cache.path} and {first.path} were built with different VAEs; build one of them "
                                "again")
            if sample and cache.header.stored != "moments":
                raise UserError(f"{cache.path} holds no log-variances to draw samples with; build it with "
                                "--store moments, or train on means")
        self.sample, self.seed = sample, seed
        self._first = np.cumsum([0, *map(len, self.caches)])
        self._mean, self._std = (torch.tensor(values)[:, None, None, None] for values in (
            (first.latents_mean, first.latents_std) if normalise else ([0.0], [1.0])))

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        clip, epoch = key if isinstance(key, SampleKey) else SampleKey(key)
        clip_id: str = self.text(clip, "id")
        draw = generator(self.seed, "posterior", epoch, clip_id) if self.sample else None
        latent = self.latent(clip, draw=draw)
        captions = self.captions(clip)
        choice = draw_index(len(captions), self.seed, "caption", epoch, clip_id)
        return {"latents": (latent - self._mean).div_(self._std), "caption": captions[choice], "id": clip_id}

    def latent(self, clip: int, spans: Sequence[tuple[int, int]] | None = None,
               draw: torch.Generator | None = None) -> Tensor:
        """Return raw latents (c, t, h, w) float32 of a clip, or of some spans [first, end) of its latent frames,
        concatenated; nothing else is read. The posterior's mean, or with `draw` a sample of it."""
        cache, i = self._locate(clip)
        stored = cache.entry(i) if draw is None else cache.stored(i)
        if spans is not None:
            stored = torch.cat([stored[:, first:end] for first, end in spans], dim=1)
        if draw is None:
            return stored.float()
        return DiagonalGaussianDistribution(stored[None].float()).sample(draw)[0]

    def text(self, clip: int, column: str) -> str:
        """Return a clip's value in a column of text, such as "id"."""
        cache, i = self._locate(clip)
        value: str = cache.value(i, column)
        return value

    def captions(self, clip: int) -> list[str]:
        """Return all captions of a clip, at least one."""
        cache, i = self._locate(clip)
        captions: list[str] = cache.value(i, "captions")
        return captions

    def shape(self, clip: int) -> tuple[int, int, int, int]:
        """Return (c, t, h, w) of a clip's mean latent."""
        cache, i = self._locate(clip)
        c, t, h, w = cache.shape(i)
        return c, t, h, w

    def first(self, number: int) -> int:
        """Return the index of a cache's first clip."""
        return int(self._first[number])

    def _locate(self, clip: int) -> tuple[LatentCache, int]:
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {clip} of {len(self)}")
        number = int(np.searchsorted(self._first, clip, "right")) - 1
        return self.caches[number], clip - int(self._first[number])

    def shards(self, clips: Iterable[int]) -> set[tuple[int, int]]:
        """Return the shards of some clips that may have to be fetched: the number of the cache, and the position in
        it."""
        located = ((int(np.searchsorted(self._first, clip, "right")) - 1, clip) for clip in clips)
        return {(number, self.caches[number].shard_of(clip - int(self._first[number]))) for number, clip in located
                if not self.caches[number].is_local}

    def buckets(self, window: int = WINDOW) -> list[dict[str, np.ndarray | ClipOrder]]:
        """Return each cache's buckets, with the clips' indices in this dataset: a list, or for a cache that is in an
        object store or very large an order of shards in windows."""
        return [self._listed(number) if cache.lists_clips else {
            name: WindowShuffle(cache, [name], window, first=int(self._first[number])) for name in cache.bucket_names}
            for number, cache in enumerate(self.caches)]

    def _listed(self, number: int) -> dict[str, np.ndarray | ClipOrder]:
        first, dtype = int(self._first[number]), np.int32 if len(self) < 2**31 else np.int64
        return {name: clips.astype(dtype, copy=False) + first if first else clips
                for name, clips in self.caches[number].buckets.items()}


def draw_index(count: int, seed: int, *names: str | int) -> int:
    """Draw one of `count` uniformly, as a pure function of the seed and the names."""
    return 0 if count == 1 else int(torch.randint(count, (), generator=generator(seed, *names)))


@dataclass(frozen=True)
class _BatchGroup:
    """Clips of one shape, which are batched together."""

    name: str
    clips: ClipOrder
    batch: int  # clips per step, over all processes
    share: float  # of all steps


class BucketBatches(Sampler[list[SampleKey]]):
    """Batches of one bucket each: a pure function of (seed, step, rank, world size), so that a training resumes at any
    step without a saved state.

    Each bucket is an endless sequence of orders of its clips, from which batches are taken without gaps: nothing
    is dropped at the end of an epoch, a batch may span two. Buckets alternate as evenly as their shares allow; all
    processes have the same bucket in the same step.

    Args:
        buckets: as `LatentDataset.buckets` returns them.
        batch: clips per process and step; a dict gives it by bucket.
        weights: each cache's share of the samples, relative; None: proportional to its number of clips.
        start, steps: the steps to iterate over; steps None: without an end.
    """

    def __init__(self, buckets: Sequence[Mapping[str, np.ndarray | ClipOrder]], batch: int | dict[str, int], *,
                 seed: int = 0, rank: int = 0, world: int = 1, weights: Sequence[float] | None = None, start: int = 0,
                 steps: int | None = None) -> None:
        clips = [sum(map(len, cache.values())) for cache in buckets]
        rates = list(map(float, clips if weights is None else weights))
        if len(rates) != len(buckets) or any(not 0 <= rate < math.inf for rate in rates) or (
                weights is not None and not sum(rates)):
            raise UserError(f"{len(buckets)} caches need as many finite weights of at least 0, not all of them 0; got "
                            f"{rates}")
        self.seed, self.rank, self.world, self.start, self.steps = seed, rank, world, start, steps
        self._size = batch
        # How often a clip of each cache is seen; the number of batches of each bucket follows from that.
        visits = [weight / count if count else 0.0 for weight, count in zip(rates, clips, strict=True)]
        raw = [(f"{number}:{name}", as_order(members), size := self._batch_size(name) * world,
                rate * len(members) / size)
               for number, (cache, rate) in enumerate(zip(buckets, visits, strict=True))
               for name, members in sorted(cache.items()) if rate and len(members)]
        total_share = sum(share for *_, share in raw)
        self.groups = [_BatchGroup(name, members, size, share / total_share) for name, members, size, share in raw]
        if not self.groups:
            raise UserError("there are no clips to make batches of")
        # A phase for each group, so that they do not all fall on the same step.
        order = torch.randperm(len(self.groups), generator=generator(seed, "turns")).double()
        self._offsets: list[float] = ((order + 0.5) / len(self.groups)).tolist()

    def _batch_size(self, bucket: str) -> int:
        size = self._size if isinstance(self._size, int) else self._size.get(bucket, 0)
        if size < 1:
            raise UserError(f"the batch size of bucket {bucket} is {size}; it must be at least 1")
        return size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.start
        while self.steps is None or step < self.start + self.steps:
            yield self.batch(step)
            step += 1

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("endless batches have no length")
        return self.steps

    def batch(self, step: int) -> list[SampleKey]:
        """Return this process's clips of a step."""
        return self.rank_batch(step, self.rank)[1]

    def rank_batch(self, step: int, rank: int) -> tuple[int, list[SampleKey]]:
        """Return a step's group, and a rank's clips of it: ranks take consecutive slices of the group's sequence."""
        number, steps_before = self.bucket_at_step(step)
        group = self.groups[number]
        size = group.batch // self.world
        first = steps_before * group.batch + rank * size
        return number, [self._sample_at(number, position) for position in range(first, first + size)]

    def bucket_at_step(self, step: int) -> tuple[int, int]:
        """Return a step's group, and the number of steps it had before."""
        # Group g has its k-th step at the time (k + offset) / share; steps are all these times in order. `step` of them
        # lie before the time that is searched.
        low, high = max(0.0, step - len(self.groups) - 1.0), step + len(self.groups) + 1.0
        while high - low > 1e-9 * max(1.0, high):
            middle = (low + high) / 2
            if sum(self._steps_before(middle)) <= step:
                low = middle
            else:
                high = middle
        before = self._steps_before(low)
        # Steps between the two limits are ordered by their exact times.
        times = sorted(((count + offset) / group.share, number) for number, (group, offset, count) in
                       enumerate(zip(self.groups, self._offsets, before, strict=True)))
        for _ in range(step - sum(before)):
            number = times[0][1]
            before[number] += 1
            times[0] = ((before[number] + self._offsets[number]) / self.groups[number].share, number)
            times.sort()
        return times[0][1], before[times[0][1]]

    def _steps_before(self, time: float) -> list[int]:
        """Return how many steps each group has before a time."""
        return [max(0, int(np.ceil(time * group.share - offset)))
                for group, offset in zip(self.groups, self._offsets, strict=True)]

    def _sample_at(self, number: int, position: int) -> SampleKey:
        clips = self.groups[number].clips
        epoch, i = divmod(position, len(clips))
        return SampleKey(clips.clip_at(self.seed, number, epoch, i), epoch)
