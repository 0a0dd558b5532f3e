"""Which windows the clips of some caches yield, in buckets of one shape, and which clips are held out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from odvae import AutoencoderKLODVAE
from odvae.cache.dataset import LatentDataset
from odvae.cache.order import WINDOW, ClipOrder, WindowShuffle
from odvae.cache.partition import READERS
from odvae.cache.reader import LatentCache
from odvae.utils.errors import UserError


@dataclass(frozen=True)
class Bucket:
    """Windows that share batches: of one cache, one kind and one shape."""

    cache: int
    mid_clip: bool  # from anywhere in the clips; else from their start
    shape: tuple[int, int, int]  # (T, h, w) of a window's latents
    clips: np.ndarray | ClipOrder  # their indices in the `LatentDataset`

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class HeldOut:
    """Clips that are not trained on.

    Attributes:
        clips: sorted indices of all clips of the held-out files.
        evaluated: indices of those that are evaluated.
        files: number of held-out files.
    """

    clips: np.ndarray
    evaluated: np.ndarray
    files: int

    def of(self, first: int, count: int) -> np.ndarray:
        """Return the clips of one cache, by their number in it."""
        mine: np.ndarray = self.clips[slice(*np.searchsorted(self.clips, (first, first + count)))] - first
        return mine


@dataclass(frozen=True)
class WindowSpec:
    """How clips become windows. Lengths are in latent frames."""

    start_length: int  # at most, of a window at a clip's start
    mid_clip_length: int  # of one from anywhere in the clip, besides the clip's first latent
    patch_size: int  # sides must be multiples of it

    def buckets(self, dataset: LatentDataset, held: HeldOut, window: int = WINDOW) -> list[Bucket]:
        """Sort the clips that are not held out into buckets. A clip yields a window at its start and, if it is long
        enough, a mid-clip window.

        Within a bucket clips are sorted by ID: a training does not depend on the order in which the workers of a build
        finished. Those of a cache that is in an object store, or very large, are drawn in windows of `window` shards.

        Raises:
            UserError: a size is not a multiple of the patch size.
        """
        buckets: list[Bucket] = []
        for number, cache in enumerate(dataset.caches):
            names = self._names(dataset, number)
            first = dataset.first(number)
            excluded = held.of(first, len(cache))
            if cache.lists_clips:
                trained = np.ones(len(cache), bool)
                trained[excluded] = False
                order = np.empty(len(cache), np.int64)  # position of each clip when sorted by ID
                order[pc.sort_indices(cache.column("id")).to_numpy()] = np.arange(len(cache))
            for key, some in names.items():
                clips: np.ndarray | ClipOrder
                if cache.lists_clips:
                    rows = np.concatenate([listed[trained[listed]] for name in some
                                           for listed in [cache.buckets[name]]])
                    clips = rows[np.argsort(order[rows])] + first
                else:
                    clips = WindowShuffle(cache, some, window, excluded, first)
                if len(clips):
                    buckets.append(Bucket(number, *key, clips))
        return buckets

    def evaluated(self, dataset: LatentDataset, held: HeldOut) -> list[Bucket]:
        """Sort the clips that are evaluated into buckets, within a bucket by ID."""
        buckets: list[Bucket] = []
        for number, cache in enumerate(dataset.caches):
            first = dataset.first(number)
            rows = held.evaluated[(held.evaluated >= first) & (held.evaluated < first + len(cache))] - first
            ids = np.array(cache.take(rows.tolist(), "id"), object)
            bucket_of = np.array(cache.bucket_names, object)[cache.codes[rows]] if len(rows) else rows
            for key, names in self._names(dataset, number).items():
                chosen = np.isin(bucket_of, names)
                if not key[0] and chosen.any():
                    buckets.append(Bucket(number, *key, (rows[chosen] + first)[np.argsort(ids[chosen], kind="stable")]))
        return buckets

    def _names(self, dataset: LatentDataset, number: int) -> dict[tuple[bool, tuple[int, int, int]], list[str]]:
        """The names of a cache's buckets by the kind and shape of their windows, sorted."""
        cache, found = dataset.caches[number], defaultdict[tuple[bool, tuple[int, int, int]], list[str]](list)
        for name, (_, t, h, w) in cache.bucket_shapes.items():
            self._check_size(cache, name, h, w)
            found[False, (min(t, self.start_length), h, w)].append(name)
            if t > self.mid_clip_length:
                found[True, (1 + self.mid_clip_length, h, w)].append(name)
        return dict(sorted(found.items()))

    def _check_size(self, cache: LatentCache, name: str, h: int, w: int) -> None:
        p, ratio = self.patch_size, cache.header.vae.spatial_compression_ratio
        if h % p or w % p:
            height, width = (max(1, round(side / p)) * p * ratio for side in (h, w))
            raise UserError(f"{cache.path} has clips (bucket {name}) of {h * ratio}x{w * ratio} pixels, that is "
                            f"latents of {h}x{w}, which are not multiples of the patch size {p}. The nearest size is "
                            f"{height}x{width}: build the cache with it, or set model.patch_size to a common divisor")


def window_latents(frames: int, vae: AutoencoderKLODVAE, group_size: int) -> int:
    """Latent frames of a window of `frames` video frames.

    Raises:
        UserError: they are not 1 + 4k, or not the first latent and whole groups.
    """
    latents = vae.latent_frames(frames)
    if (latents - 1) % group_size:
        step = vae.temporal_compression_ratio * group_size
        below = 1 + (frames - 1) // step * step
        raise UserError(f"windows.frames={frames} are {latents} latent frames: the first and {latents - 1} more, which "
                        f"are not whole groups of {group_size}; the nearest are {below} and {below + step}")
    return latents


def hold_out(caches: Sequence[LatentCache], count: int) -> HeldOut:
    """Hold out whole files: clips of one film are similar and must not be on both sides.

    Files are taken in the order of their content's hash, a random choice that new files hardly change and that is the
    same in every cache, until they have `count` clips; at most a quarter of all clips. A file that would exceed that is
    skipped.
    """
    total, candidates = sum(map(len, caches)), max(16, count)
    while True:
        files, complete = _first_files(caches, candidates)
        chosen, clips = list[np.ndarray](), 0
        for rows in files:
            if clips >= count:
                break
            if clips + len(rows) <= total // 4:
                chosen.append(rows)
                clips += len(rows)
        if clips >= count or complete:
            break
        candidates *= 8  # many files were too large
    held = np.sort(np.concatenate([*chosen, np.zeros(0, np.int64)]))
    ids: list[str] = []
    first = 0
    for cache in caches:
        ids += cache.take((held[(held >= first) & (held < first + len(cache))] - first).tolist(), "id")
        first += len(cache)
    order = pc.sort_indices(pa.array(ids, pa.string())).to_numpy()
    return HeldOut(held, np.sort(held[order[:count]]), len(chosen))


def _first_files(caches: Sequence[LatentCache], count: int) -> tuple[list[np.ndarray], bool]:
    """Return the clips of the first `count` files or more, in the order of their contents' hashes, and whether these
    are all files. Partitions are read in the order of their least hash, until no other can have one of these files."""
    kept: dict[str, list[np.ndarray]] = {}
    last = None  # the greatest hash of the kept files, if there are others
    firsts = itertools.accumulate(map(len, caches), initial=0)
    parts = sorted((part.least_content, first + part.first, number, part)
                   for number, (cache, first) in enumerate(zip(caches, firsts, strict=False)) for part in cache.parts)
    for begin in range(0, len(parts), READERS):
        some = [part for part in parts[begin : begin + READERS] if last is None or part[0] <= last]
        with ThreadPoolExecutor(READERS) as pool:
            tables = pool.map(lambda part: caches[part[2]].read_rows(part[3].number, ("content",)), some)
        for (_, first, *_), table in zip(some, tables, strict=True):
            contents = table["content"].combine_chunks()
            rows = np.arange(len(contents))
            if last is not None:
                rows = rows[pc.less_equal(contents, last).to_numpy(zero_copy_only=False)]
            coded = contents.take(pa.array(rows)).dictionary_encode()
            codes = np.from_dlpack(coded.indices)
            order = np.argsort(codes, kind="stable")
            ends = np.bincount(codes, minlength=len(coded.dictionary)).cumsum()
            for content, found in zip(coded.dictionary.to_pylist(), np.split(rows[order], ends), strict=False):
                kept.setdefault(content, []).append(found + first)
            if len(kept) > count:
                kept = {content: kept[content] for content in sorted(kept)[:count]}
                last = max(kept)
    return [np.sort(np.concatenate(kept[content])) for content in sorted(kept)], last is None
