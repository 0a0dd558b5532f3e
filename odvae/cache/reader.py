"""Read a latent cache: an index in memory, latents by mmap."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.errors import UserError
from .format import committed_shards, merge_moments, read_header, read_index, shard_paths


class LatentCache:
    """The latents of a collection, in the order in which they were built.

    Can be pickled and used in data loader workers; every process maps the files by itself.

    Args:
        path: the cache folder.
        vae_fingerprint: of the VAE that the latents are to be used with (`format.vae_fingerprint`); None: any.

    Attributes:
        header: which VAE and transform made it.
        index: one row a clip, see `format.SCHEMA`.

    Raises:
        UserError: no cache, an unknown version, another VAE, no clips, a shard that is missing or damaged.
    """

    def __init__(self, path: Path | str, vae_fingerprint: str | None = None) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        if vae_fingerprint is not None and vae_fingerprint != self.header.vae.fingerprint:
            raise UserError(f"{self.path} was made with another VAE: its fingerprint is {self.header.vae.fingerprint}, "
                            f"and that of the VAE given is {vae_fingerprint}; build a cache with this VAE, or load "
                            "the other one")
        self._shards = committed_shards(self.path)
        tables = [read_index(shard_paths(self.path, name)[1])[0] for name in self._shards]
        self._first = np.cumsum([0, *(len(table) for table in tables)])  # row at which each shard begins
        if not self._first[-1]:
            raise UserError(f"{self.path} holds no clips yet; finish it with `odvae cache build`")
        self.index: pa.Table = pa.concat_tables(tables)
        self._open: dict[int, Any] = {}
        for name, table in zip(self._shards, tables, strict=True):
            if len(table) and not shard_paths(self.path, name)[0].is_file():
                raise UserError(f"{shard_paths(self.path, name)[0]} is missing; restore it, or delete the .parquet of "
                                "the same name and build again: only its clips are encoded anew")

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay with their process

    @cached_property
    def ids(self) -> list[str]:
        found: list[str] = self.index["id"].to_pylist()
        return found

    @cached_property
    def captions(self) -> list[str]:
        found: list[str] = self.index["caption"].to_pylist()
        return found

    @cached_property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of each latent (c, t, h, w); a photo's t is 1."""
        return [tuple(shape) for shape in self.index["shape"].to_pylist()]

    @cached_property
    def _moments(self) -> tuple[list[float], list[float]]:
        return merge_moments(self.index)

    @property
    def latents_mean(self) -> list[float]:
        """Per channel, over every value of the cache as stored."""
        return self._moments[0]

    @property
    def latents_std(self) -> list[float]:
        """Per channel, over every value of the cache as stored."""
        return self._moments[1]

    def entry(self, i: int) -> Tensor:
        """Latent i as stored: raw (not normalised), (c, t, h, w), in the cache's dtype. Raises IndexError, UserError.

        It lies in the mapped file and is not copied: do not write into it.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"entry {i} of a cache of {len(self)} clips")
        i %= len(self)
        shard = int(np.searchsorted(self._first, i, "right")) - 1
        path = shard_paths(self.path, self._shards[shard])[0]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(path, framework="pt")
            latent: Tensor = self._open[shard].get_tensor(self.ids[i])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it together with its .parquet and build again: only "
                            "its clips are encoded anew") from error
        return latent
