"""Which windows the clips of some caches give, sorted into buckets of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from odvae import AutoencoderKLODVAE
from odvae.cache.dataset import LatentDataset
from odvae.cache.reader import LatentCache, dictionary_encode
from odvae.utils.errors import UserError


@dataclass(frozen=True)
class Bucket:
    """Windows that make batches together: of one cache, one kind and one shape."""

    cache: int
    later: bool  # from later in the clips; else from their start
    shape: tuple[int, int, int]  # (T, h, w) of a window's latents
    clips: np.ndarray  # their numbers in the `LatentDataset`

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class WindowSpec:
    """How clips become windows. Lengths are in latent frames."""

    longest: int  # of a window at a clip's start
    later: int  # of one from later, besides the clip's first latent
    patch_size: int  # sides must be multiples of it

    def buckets(self, dataset: LatentDataset, chosen: np.ndarray) -> list[Bucket]:
        """Of the chosen clips (a bool each), those of a bucket by their ids: a training does not depend on the order in
        which the workers of a build were done.

        A clip gives a window at its start, and where it is long enough one from later.

        Raises:
            UserError: a size that does not fit the patches.
        """
        found: dict[tuple[int, bool, tuple[int, int, int]], list[np.ndarray]] = defaultdict(list)
        for number, buckets in enumerate(dataset.buckets()):
            for name, every in buckets.items():
                _, t, h, w = dataset.shape(int(every[0]))
                self._check_size(dataset.caches[number], name, h, w)
                clips = every[chosen[every]]
                if not len(clips):
                    continue
                found[number, False, (min(t, self.longest), h, w)].append(clips)
                if t > self.later:
                    found[number, True, (1 + self.later, h, w)].append(clips)
        place = np.empty(len(dataset), np.int64)  # of each clip, by its id
        place[pc.sort_indices(joined_column(dataset.caches, "id")).to_numpy()] = np.arange(len(dataset))
        return [Bucket(*key, _ordered(np.concatenate(clips), place)) for key, clips in sorted(found.items())]

    def _check_size(self, cache: LatentCache, name: str, h: int, w: int) -> None:
        p, ratio = self.patch_size, cache.header.vae.spatial_compression_ratio
        if h % p or w % p:
            height, width = (max(1, round(side / p)) * p * ratio for side in (h, w))
            raise UserError(f"{cache.path} has clips (bucket {name}) of {h * ratio}x{w * ratio} pixels, which are "
                            f"latents of {h}x{w}: no multiples of the patch size {p}. The nearest size is "
                            f"{height}x{width}: build the cache with it, or set model.patch_size to what divides both")


def _ordered(clips: np.ndarray, place: np.ndarray) -> np.ndarray:
    return clips[np.argsort(place[clips])]


def joined_column(caches: Sequence[LatentCache], name: str) -> pa.ChunkedArray:
    """A column of text of all clips, one cache after the other."""
    return pa.chunked_array([chunk for cache in caches for chunk in cache.column(name).chunks], pa.string())


def whole_groups(frames: int, vae: AutoencoderKLODVAE, group_size: int) -> int:
    """Latent frames of a window of so many video frames.

    Raises:
        UserError: they are not 1 + 4k, or not the first latent and whole groups.
    """
    latents = vae.latent_frames(frames)
    if (latents - 1) % group_size:
        step = vae.temporal_compression_ratio * group_size
        below = 1 + (frames - 1) // step * step
        raise UserError(f"windows.frames={frames} are {latents} latent frames: the first and {latents - 1} more, which "
                        f"are no whole groups of {group_size}; the nearest are {below} and {below + step}")
    return latents


@dataclass(frozen=True)
class HeldOut:
    """What is not trained on.

    Attributes:
        clips: numbers of all clips of some files, sorted.
        shown: of those that are evaluated.
        files: how many files these are.
    """

    clips: np.ndarray
    shown: np.ndarray
    files: int


def hold_out(caches: Sequence[LatentCache], count: int) -> HeldOut:
    """Hold whole files out: clips of one film are alike, and must not lie on both sides.

    Files are taken in the order of their content's hash, which is a random choice that new files hardly move and that
    is the same in every cache, until they have `count` clips; at most a fourth of all clips. A file that would be more
    than that is passed over.
    """
    codes, contents = dictionary_encode(joined_column(caches, "content"))
    sizes = np.bincount(codes, minlength=len(contents))
    chosen, clips = list[int](), 0
    for file in pc.sort_indices(contents).to_pylist():
        if clips >= count:
            break
        if clips + sizes[file] <= len(codes) // 4:
            chosen.append(file)
            clips += int(sizes[file])
    held = np.flatnonzero(np.isin(codes, chosen))
    order = pc.sort_indices(joined_column(caches, "id").take(pa.array(held, pa.int64()))).to_pylist()
    return HeldOut(held, np.sort(held[order[:count]]), len(chosen))
