"""Which windows the clips of some caches yield, in buckets of one shape, and which clips are held out."""

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
    """Windows that share batches: of one cache, one kind and one shape."""

    cache: int
    mid_clip: bool  # from anywhere in the clips; else from their start
    shape: tuple[int, int, int]  # (T, h, w) of a window's latents
    clips: np.ndarray  # their indices in the `LatentDataset`

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


@dataclass(frozen=True)
class WindowSpec:
    """How clips become windows. Lengths are in latent frames."""

    start_length: int  # at most, of a window at a clip's start
    mid_clip_length: int  # of one from anywhere in the clip, besides the clip's first latent
    patch_size: int  # sides must be multiples of it

    def buckets(self, dataset: LatentDataset, chosen: np.ndarray) -> list[Bucket]:
        """Sort the chosen clips (a bool each) into buckets, within a bucket by ID: a training does not depend on the
        order in which the workers of a build finished.

        A clip yields a window at its start and, if it is long enough, a mid-clip window.

        Raises:
            UserError: a size is not a multiple of the patch size.
        """
        buckets: dict[tuple[int, bool, tuple[int, int, int]], list[np.ndarray]] = defaultdict(list)
        for cache, cache_buckets in enumerate(dataset.buckets()):
            for name, all_clips in cache_buckets.items():
                _, t, h, w = dataset.shape(int(all_clips[0]))
                self._check_size(dataset.caches[cache], name, h, w)
                clips = all_clips[chosen[all_clips]]
                if not len(clips):
                    continue
                buckets[cache, False, (min(t, self.start_length), h, w)].append(clips)
                if t > self.mid_clip_length:
                    buckets[cache, True, (1 + self.mid_clip_length, h, w)].append(clips)
        order = np.empty(len(dataset), np.int64)  # position of each clip when sorted by ID
        order[pc.sort_indices(concat_column(dataset.caches, "id")).to_numpy()] = np.arange(len(dataset))
        return [Bucket(*key, _sorted_by(order, np.concatenate(clips))) for key, clips in sorted(buckets.items())]

    def _check_size(self, cache: LatentCache, name: str, h: int, w: int) -> None:
        p, ratio = self.patch_size, cache.header.vae.spatial_compression_ratio
        if h % p or w % p:
            height, width = (max(1, round(side / p)) * p * ratio for side in (h, w))
            raise UserError(f"{cache.path} has clips (bucket {name}) of {h * ratio}x{w * ratio} pixels, that is "
                            f"latents of {h}x{w}, which are not multiples of the patch size {p}. The nearest size is "
                            f"{height}x{width}: build the cache with it, or set model.patch_size to a common divisor")


def _sorted_by(order: np.ndarray, clips: np.ndarray) -> np.ndarray:
    return clips[np.argsort(order[clips])]


def concat_column(caches: Sequence[LatentCache], name: str) -> pa.ChunkedArray:
    """A text column of all clips, one cache after the other."""
    return pa.chunked_array([chunk for cache in caches for chunk in cache.column(name).chunks], pa.string())


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


def hold_out(caches: Sequence[LatentCache], count: int) -> HeldOut:
    """Hold out whole files: clips of one film are similar and must not be on both sides.

    Files are taken in the order of their content's hash, a random choice that new files hardly change and that is the
    same in every cache, until they have `count` clips; at most a quarter of all clips. A file that would exceed that is
    skipped.
    """
    codes, contents = dictionary_encode(concat_column(caches, "content"))
    sizes = np.bincount(codes, minlength=len(contents))
    chosen, clips = list[int](), 0
    for file in pc.sort_indices(contents).to_pylist():
        if clips >= count:
            break
        if clips + sizes[file] <= len(codes) // 4:
            chosen.append(file)
            clips += int(sizes[file])
    held = np.flatnonzero(np.isin(codes, chosen))
    order = pc.sort_indices(concat_column(caches, "id").take(pa.array(held, pa.int64()))).to_pylist()
    return HeldOut(held, np.sort(held[order[:count]]), len(chosen))
