"""Training windows from a latent cache, as a pure function of (seed, step, rank)."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from odvae import AutoencoderKLODVAE
from odvae.cache.reader import LatentCache
from odvae.cache.text import compact, embed_captions, embeddings
from odvae.runtime.config import Config
from odvae.runtime.errors import UserError
from odvae.runtime.seeding import generator

from .model.groups import frame_positions
from .text import TextEncoder

logger = logging.getLogger("odvae")


class WindowConfig(Config):
    cache: Path = Path("data/cache")
    frames: int = Field(17, ge=1)  # video frames of a window at a clip's start, 1 + 4k: the training length
    history: int = Field(2, ge=0)  # groups that the group after them looks back on, in training as in a rollout
    later: float = Field(0.5, ge=0, le=1)  # share of steps on windows from later in the clips
    held_out: int = Field(64, ge=0)  # clips that are not trained on but evaluated


@dataclass(frozen=True)
class Windows:
    """One batch of windows, all of one kind."""

    latents: Tensor  # (B, c, T, h, w) normalised
    captions: Tensor  # (B,) index of the caption in `LatentWindows.captions`
    positions: tuple[int, ...]  # of the T latents in time; the first is always the clip's first
    names: tuple[str, ...]  # the clips' ids in the cache

    @property
    def frames(self) -> int:
        """Latent frames of all windows together."""
        return self.latents.shape[0] * self.latents.shape[2]


class LatentWindows:
    """A cache read as windows of two kinds.

    A rollout begins at a clip's start, and later sees the first latent (the sink), the last `history` groups and the
    group it makes. Training shows both: the clip's first `frames` frames; and its first latent followed by
    `history` + 1 groups from anywhere later.
    """

    def __init__(self, config: WindowConfig, vae: AutoencoderKLODVAE, group_size: int, seed: int) -> None:
        self.config, self.vae, self.seed, self.group_size = config, vae, seed, group_size
        self.cache = LatentCache(config.cache, vae)
        self.start_length = vae.latent_frames(config.frames)
        self.later_length = group_size * (config.history + 1)  # besides the first latent
        lengths: list[int] = self.cache.shapes[:, 1].tolist()
        sizes = {(h, w) for h, w in self.cache.shapes[:, 2:].tolist()}
        if len(sizes) > 1:
            raise UserError(f"{config.cache} holds latents of several sizes {sorted(sizes)}; this trainer takes one. "
                            f"Build the cache with one height and width")
        fit = [i for i, length in enumerate(lengths) if length >= self.start_length]
        if not fit:
            raise UserError(f"no clip in {config.cache} has {config.frames} frames; the longest has "
                            f"{1 + (max(lengths, default=1) - 1) * vae.temporal_compression_ratio}. "
                            f"Set windows.frames to that or less, or build the cache with longer clips")
        # Ids are hashes, so the lowest of them are a random choice, which new clips hardly move.
        by_id = sorted(fit, key=lambda i: self.cache.ids[i])
        held = min(config.held_out, len(fit) // 4)
        self.held_out, self.training = by_id[:held], sorted(by_id[held:])
        self.long = [i for i in self.training if lengths[i] > self.later_length]
        self.lengths = lengths
        self.captions = sorted({self.cache.captions[i] for i in fit})
        self._caption = {caption: number for number, caption in enumerate(self.captions)}
        self.size: tuple[int, int] = next(iter(sizes))

    def batch(self, step: int, rank: int, size: int) -> Windows:
        """`size` windows drawn at random; every process draws the same kind in the same step."""
        later = float(torch.rand((), generator=generator(self.seed, "kind", step))) < self.config.later
        rng = generator(self.seed, "windows", step, rank)
        if later and self.long:
            chosen = [self.long[i] for i in torch.randint(0, len(self.long), (size,), generator=rng).tolist()]
            # Windows lie on the same grid of groups that a rollout makes: after the first latent, whole groups.
            places = [(self.lengths[i] - 1 - self.later_length) // self.group_size + 1 for i in chosen]
            begins = [1 + self.group_size * int(torch.randint(0, n, (), generator=rng)) for n in places]
            return self._windows(chosen, begins, self.later_length, far=True)
        picks = torch.randint(0, len(self.training), (size,), generator=rng).tolist()
        return self._starts([self.training[i] for i in picks])

    def held_out_batch(self) -> Windows:
        """The starts of all held-out clips."""
        return self._starts(self.held_out)

    def _starts(self, entries: list[int]) -> Windows:
        return self._windows(entries, [1] * len(entries), self.start_length - 1, far=False)

    def _windows(self, entries: list[int], begins: list[int], length: int, *, far: bool) -> Windows:
        """Of each entry the first latent and the `length` latents from `begins` on."""
        raw = torch.stack([torch.cat([latent[:, :1], latent[:, begin : begin + length]], dim=1).float()
                           for latent, begin in zip(map(self.cache.entry, entries), begins, strict=True)])
        captions = torch.tensor([self._caption[self.cache.captions[i]] for i in entries])
        return Windows(self.vae.normalize(raw), captions, frame_positions(1 + length, self.group_size, far),
                       tuple(self.cache.ids[i] for i in entries))


class CaptionTable:
    """Every caption's embedding: (captions + 1, N, D), the last row for the empty caption. They are a part of the
    cache, where they are computed once for each encoder; of one that cannot be written to they are computed here."""

    def __init__(self, encoder: TextEncoder, captions: list[str], cache: Path, name: str = "") -> None:
        texts = [*captions, ""]
        try:
            store, _ = embed_captions(cache, encoder, texts, name=name)
            vectors = [store.embedding(text).float() for text in texts]
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logger.warning("%s cannot be written to: the captions' embeddings are computed for this run alone", cache)
            vectors = [compact(vector).float() for vector in embeddings(encoder, texts)]
        self.embeds = pad_sequence(vectors, batch_first=True)
        self.mask = pad_sequence([torch.ones(len(vector), dtype=torch.bool) for vector in vectors], batch_first=True)

    def __call__(self, captions: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, N, D) and mask (B, N) of captions (B,), the empty one's where `dropped` (B,)."""
        rows = torch.where(dropped, len(self.embeds) - 1, captions)
        return self.embeds[rows], self.mask[rows]
