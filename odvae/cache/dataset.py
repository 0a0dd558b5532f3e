"""Latents for training: a map-style dataset over caches, and batches as a pure function of (seed, step, rank)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..model.outputs import DiagonalGaussianDistribution
from ..utils.errors import UserError
from ..utils.seeding import generator
from .reader import LatentCache


class SampleKey(NamedTuple):
    """One clip in one epoch."""

    clip: int
    epoch: int = 0


class LatentDataset(Dataset[dict[str, Any]]):
    """The clips of one cache or of several, one after the other.

    An item is {"latents": (c, t, h, w) float32, "caption": str, "id": str}. It is asked for by its number, or by a
    `SampleKey`, whose epoch says which of the clip's captions, and which sample of the posterior, are drawn.

    Args:
        caches: of one VAE.
        normalise: by the cache's measured mean and standard deviation, a channel each (of several caches together: the
            first one's, so that latents mean the same in all).
        sample: draw from the posterior, a fresh one each epoch; else its mean. Needs caches that hold moments.
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
                raise UserError(f"{cache.path} and {first.path} were made with different VAEs; build one of them again")
            if sample and cache.header.stored != "moments":
                raise UserError(f"{cache.path} holds no log-variances to draw samples with; build it with "
                                "--store moments, or train on means")
        self.sample, self.seed = sample, seed
        self._first = np.cumsum([0, *map(len, self.caches)])
        self._mean, self._std = (torch.tensor(values)[:, None, None, None] for values in (
            (first.latents_mean, first.latents_std) if normalise else ([0.0], [1.0])))

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, pick: int | SampleKey) -> dict[str, Any]:
        clip, epoch = pick if isinstance(pick, SampleKey) else SampleKey(pick)
        name: str = self.text(clip, "id")
        draw = generator(self.seed, "posterior", epoch, name) if self.sample else None
        latent = self.latent(clip, draw=draw)
        captions = self.captions(clip)
        number = draw_index(len(captions), self.seed, "caption", epoch, name)
        return {"latents": (latent - self._mean).div_(self._std), "caption": captions[number], "id": name}

    def latent(self, clip: int, spans: Sequence[tuple[int, int]] | None = None,
               draw: torch.Generator | None = None) -> Tensor:
        """Raw latents (c, t, h, w) float32 of a clip, or of some spans [first, end) of its latent frames one after the
        other, and nothing else is read. The posterior's mean, or with `draw` a sample of it."""
        cache, i = self._place(clip)
        stored = cache.entry(i) if draw is None else cache.stored(i)
        if spans is not None:
            stored = torch.cat([stored[:, first:end] for first, end in spans], dim=1)
        if draw is None:
            return stored.float()
        return DiagonalGaussianDistribution(stored[None].float()).sample(draw)[0]

    def text(self, clip: int, column: str) -> str:
        """What stands in a column of text, such as "id"."""
        cache, i = self._place(clip)
        found: str = cache.column(column)[i].as_py()
        return found

    def captions(self, clip: int) -> list[str]:
        """All captions of a clip, one at least."""
        cache, i = self._place(clip)
        found: list[str] = cache.column("captions")[i].as_py()
        return found

    def shape(self, clip: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of a clip's mean latent."""
        cache, i = self._place(clip)
        c, t, h, w = cache.shapes[i].tolist()
        return c, t, h, w

    def _place(self, clip: int) -> tuple[LatentCache, int]:
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {clip} of {len(self)}")
        number = int(np.searchsorted(self._first, clip, "right")) - 1
        return self.caches[number], clip - int(self._first[number])

    def buckets(self) -> list[dict[str, np.ndarray]]:
        """Of each cache the clips of each bucket, by their numbers here."""
        return [{name: clips + first for name, clips in cache.buckets.items()}
                for cache, first in zip(self.caches, self._first[:-1].tolist(), strict=True)]


def draw_index(count: int, seed: int, *names: str | int) -> int:
    """One of `count`, uniformly: a pure function of the seed and the names."""
    return 0 if count == 1 else int(torch.randint(count, (), generator=generator(seed, *names)))


@dataclass(frozen=True)
class _Group:
    """Clips of one shape that make batches together."""

    name: str
    clips: np.ndarray
    batch: int  # of all processes together
    share: float  # of all steps


class BucketBatches(Sampler[list[SampleKey]]):
    """Batches of one bucket each: a pure function of (seed, step, rank, world size), so that a training resumes at any
    step with nothing saved.

    Each bucket is an endless row of permutations of its clips, of which batches are cut without a gap: nothing is
    dropped at the end of an epoch, a batch may span two. Buckets take turns as evenly as their shares allow; all
    processes have the same bucket in the same step.

    Args:
        buckets: as `LatentDataset.buckets` gives them.
        batch: clips a process and step; by bucket where a dict.
        weights: of each cache's share of the clips that are seen, relative; None: by their numbers of clips.
        start, steps: what iterating gives; steps None: without an end.
    """

    def __init__(self, buckets: Sequence[dict[str, np.ndarray]], batch: int | dict[str, int], *, seed: int = 0,
                 rank: int = 0, world: int = 1, weights: Sequence[float] | None = None, start: int = 0,
                 steps: int | None = None) -> None:
        clips = [sum(map(len, cache.values())) for cache in buckets]
        rates = list(map(float, clips if weights is None else weights))
        if len(rates) != len(buckets) or any(not 0 <= rate < math.inf for rate in rates) or (
                weights is not None and not sum(rates)):
            raise UserError(f"{len(buckets)} caches need as many weights, finite, none below 0 and some above, got "
                            f"{rates}")
        self.seed, self.rank, self.world, self.start, self.steps = seed, rank, world, start, steps
        self._size = batch
        # How often a clip is seen, and from that how many batches there are of each bucket.
        often = [weight / count if count else 0.0 for weight, count in zip(rates, clips, strict=True)]
        raw = [(f"{number}:{name}", some, self._of(name) * world, rate * len(some) / (self._of(name) * world))
               for number, (cache, rate) in enumerate(zip(buckets, often, strict=True))
               for name, some in sorted(cache.items()) if rate and len(some)]
        whole = sum(share for *_, share in raw)
        self.groups = [_Group(name, some, size, share / whole) for name, some, size, share in raw]
        if not self.groups:
            raise UserError("there is no clip to make batches of")
        # Where in its turn each group comes, so that they do not all fall on the same step.
        order = torch.randperm(len(self.groups), generator=generator(seed, "turns")).double()
        self._offsets: list[float] = ((order + 0.5) / len(self.groups)).tolist()
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # of each group the epoch it is in, and its order

    def _of(self, bucket: str) -> int:
        size = self._size if isinstance(self._size, int) else self._size.get(bucket, 0)
        if size < 1:
            raise UserError(f"the batch of bucket {bucket} is {size}; give each bucket at least one clip a step")
        return size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self.start
        while self.steps is None or step < self.start + self.steps:
            yield self.batch(step)
            step += 1

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("batches without an end have no length")
        return self.steps

    def batch(self, step: int) -> list[SampleKey]:
        """This process's clips of a step."""
        return self.rank_batch(step, self.rank)[1]

    def rank_batch(self, step: int, rank: int) -> tuple[int, list[SampleKey]]:
        """Which group has a step, and a process's clips of it: rank by rank consecutive slices of one row."""
        number, turn = self.bucket_at_step(step)
        group = self.groups[number]
        size = group.batch // self.world
        first = turn * group.batch + rank * size
        return number, [self._at(number, place) for place in range(first, first + size)]

    def bucket_at_step(self, step: int) -> tuple[int, int]:
        """Which group has a step, and how many steps it had before."""
        # Group g has its k-th step at the time (k + offset) / share; steps are all these times in order. `step` of them
        # lie before the one that is looked for.
        low, high = max(0.0, step - len(self.groups) - 1.0), step + len(self.groups) + 1.0
        while high - low > 1e-9 * max(1.0, high):
            middle = (low + high) / 2
            if sum(self._before(middle)) <= step:
                low = middle
            else:
                high = middle
        before = self._before(low)
        # What lies between the two limits is told apart by its exact time.
        times = sorted(((count + offset) / group.share, number) for number, (group, offset, count) in
                       enumerate(zip(self.groups, self._offsets, before, strict=True)))
        for _ in range(step - sum(before)):
            number = times[0][1]
            before[number] += 1
            times[0] = ((before[number] + self._offsets[number]) / self.groups[number].share, number)
            times.sort()
        return times[0][1], before[times[0][1]]

    def _before(self, time: float) -> list[int]:
        """How many steps each group has before a time."""
        return [max(0, int(np.ceil(time * group.share - offset)))
                for group, offset in zip(self.groups, self._offsets, strict=True)]

    def _at(self, number: int, place: int) -> SampleKey:
        clips = self.groups[number].clips
        epoch, i = divmod(place, len(clips))
        known = self._permutations.get(number)
        if known is None or known[0] != epoch:
            rng = generator(self.seed, "epoch", number, epoch)
            known = self._permutations[number] = (epoch, torch.randperm(len(clips), generator=rng).numpy())
        return SampleKey(int(clips[known[1][i]]), epoch)
