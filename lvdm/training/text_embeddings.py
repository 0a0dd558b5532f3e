"""Caption embeddings for training: stored in the caches, read batch by batch."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from odvae.cache.embed import embed_captions, embeddings, to_stored_dtype
from odvae.cache.hashes import hash_keys
from odvae.cache.reader import LatentCache
from odvae.cache.text import ENCODER, TextEncoder, TextStore, text_storage
from odvae.utils.errors import UserError

from ..text import on_accelerator

logger = logging.getLogger("odvae")

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
PAD_MULTIPLE = 8  # tokens


class TextEmbeddingCache:
    """The embeddings of all captions of some caches, and of "".

    Each caption is embedded once per encoder and stored in its cache; captions that another of the caches has stored
    are not embedded again. For a read-only cache they are embedded for this run only, in memory. If nothing is missing,
    nothing is written.

    Args:
        name: of the encoder, for people.

    Raises:
        UserError: a store is damaged.
    """

    def __init__(self, encoder: TextEncoder, caches: Sequence[LatentCache], name: str = "") -> None:
        folders = {cache.path: text_storage(cache.path, encoder) for cache in caches}
        self._stores = {path: TextStore(storage) for path, storage in folders.items() if storage.exists(ENCODER)}
        self._in_memory: dict[str, Tensor] = {}  # by caption
        for cache in caches:
            missing = self._missing(cache)
            first = next(missing, None)
            if first is None:
                continue
            try:
                with on_accelerator(encoder):
                    self._stores[cache.path], _ = embed_captions(cache.path, encoder, chain([first], missing),
                                                                 name=name)
            except OSError as error:
                if error.errno not in READ_ONLY and not isinstance(error, PermissionError):
                    raise
                self._embed_in_memory(encoder, cache)

    def _embed_in_memory(self, encoder: TextEncoder, cache: LatentCache) -> None:
        missing = list(dict.fromkeys(self._missing(cache)))
        logger.warning("%s is read-only: the embeddings of %d captions are computed for this run only",
                       cache.path, len(missing))
        with on_accelerator(encoder):
            self._in_memory.update(zip(missing, map(to_stored_dtype, embeddings(encoder, missing)), strict=True))

    def _missing(self, cache: LatentCache) -> Iterator[str]:
        """Yield the captions of a cache, and "", that are not stored yet, a partition at a time. Compares hashes: a
        cache may have millions of captions, and usually none is missing."""
        for part, table in cache.scan(("caption_hashes",)):
            unknown = self._unknown(table)
            if unknown.any():
                captions = pc.list_flatten(cache.read_rows(part.number, ("captions",))["captions"])
                yield from (caption for caption in captions.filter(pa.array(unknown)).unique().to_pylist()
                            if self._find(caption) is None)
        if self._find("") is None:
            yield ""

    def _unknown(self, table: pa.Table) -> np.ndarray:
        """Whether each caption of some clips is in no store."""
        keys = hash_keys(pc.list_flatten(table["caption_hashes"]))
        unknown = np.ones(len(keys), bool)
        for store in self._stores.values():
            unknown &= ~store.has(keys)
        return unknown

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return vectors (B, N, D) float32 and mask (B, N) bool, False at padding; N is the longest caption's length,
        rounded up to a multiple of `PAD_MULTIPLE`: torch.compile builds a graph per length.

        Raises:
            UserError: no cache has a caption, or a store is damaged.
        """
        vectors = list(self._vectors(captions))
        lengths = torch.tensor([len(vector) for vector in vectors])
        mask = torch.arange(-(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE) < lengths[:, None]
        text = pad_sequence(vectors, batch_first=True)
        return pad(text, (0, 0, 0, mask.shape[1] - text.shape[1])), mask

    def _vectors(self, captions: Sequence[str]) -> Iterator[Tensor]:
        for caption in captions:
            embedding = self._find(caption)
            if embedding is None:
                raise UserError(f"the training's caches have no embedding of the caption {caption!r}; "
                                "encode it with the text encoder")
            yield embedding.float()

    def _find(self, caption: str) -> Tensor | None:
        if caption in self._in_memory:
            return self._in_memory[caption]
        return next((store.embedding(caption) for store in self._stores.values() if caption in store), None)
