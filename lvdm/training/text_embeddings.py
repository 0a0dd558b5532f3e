"""Captions' embeddings while training: they lie in the caches, and what a batch needs of them is read."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from odvae.cache.reader import LatentCache
from odvae.cache.text import TextEncoder, TextStore, embed_captions, embeddings, text_folder, to_stored_dtype
from odvae.utils.errors import UserError

logger = logging.getLogger("odvae")

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
MULTIPLE = 8  # tokens


class TextEmbeddingCache:
    """The embeddings of all captions of some caches, and of "".

    Each caption is embedded once for each encoder and kept in the cache that has it; captions that another of the
    caches holds already are not embedded again. Of a cache that cannot be written to they are embedded for this run
    alone, in memory. Where nothing is missing, nothing is written.

    Args:
        name: of the encoder, for people.

    Raises:
        UserError: a damaged store.
    """

    def __init__(self, encoder: TextEncoder, caches: Sequence[LatentCache], name: str = "") -> None:
        folders = {cache.path: text_folder(cache.path, encoder) for cache in caches}
        self._stores = {path: TextStore(folder) for path, folder in folders.items()
                        if (folder / "encoder.json").is_file()}
        self._here: dict[str, Tensor] = {}  # by caption
        for cache in caches:
            missing = self._missing(cache)
            if not missing:
                continue
            try:
                self._stores[cache.path], _ = embed_captions(cache.path, encoder, missing, name=name)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                logger.warning("%s cannot be written to: the embeddings of %d captions are computed for this run alone",
                               cache.path, len(missing))
                self._here.update(zip(missing, map(to_stored_dtype, embeddings(encoder, missing)), strict=True))

    def _missing(self, cache: LatentCache) -> list[str]:
        """The captions of a cache, and "", that lie nowhere yet. Told by whole columns of hashes: a cache may have a
        million captions, and as a rule none is missing."""
        there = pa.chunked_array([store.hashes for store in self._stores.values()], pa.string())
        captions = cache.all_captions()
        lacks = pc.invert(pc.is_in(captions["caption_hash"], there))
        missing = [*captions["caption"].filter(lacks).to_pylist(), ""]
        return [caption for caption in dict.fromkeys(missing) if self._find(caption) is None]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors (B, N, D) float32 and mask (B, N) bool, False at padding; N is that of the longest of these captions,
        up to a multiple of `MULTIPLE`: torch.compile makes a graph for each length.

        Raises:
            UserError: a caption that no cache has, a damaged store.
        """
        vectors = list(self._vectors(captions))
        lengths = torch.tensor([len(vector) for vector in vectors])
        mask = torch.arange(-(-int(lengths.max()) // MULTIPLE) * MULTIPLE) < lengths[:, None]
        text = pad_sequence(vectors, batch_first=True)
        return pad(text, (0, 0, 0, mask.shape[1] - text.shape[1])), mask

    def _vectors(self, captions: Sequence[str]) -> Iterator[Tensor]:
        for caption in captions:
            found = self._find(caption)
            if found is None:
                raise UserError(f"no embedding of the caption {caption!r} lies in the caches that are trained on; "
                                "encode it with the text encoder")
            yield found.float()

    def _find(self, caption: str) -> Tensor | None:
        if caption in self._here:
            return self._here[caption]
        return next((store.embedding(caption) for store in self._stores.values() if caption in store), None)
