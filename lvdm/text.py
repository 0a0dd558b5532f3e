"""Text encoders: a built-in one that needs no weights, and any encoder of transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from odvae.cache.text import TextEncoder
from odvae.trainer.distributed import module_on_accelerator
from odvae.utils.errors import UserError
from odvae.utils.files import fingerprint, read_json
from odvae.utils.precision import upcast_unsupported

__all__ = ["TextEncoder", "TransformersEncoder", "WordHashEncoder", "load_text_encoder", "on_accelerator",
           "split_words"]

logger = logging.getLogger("odvae")

BEGIN = "\x00begin"  # cannot be a word of a caption


def split_words(caption: str) -> list[str]:
    """Split into lower-cased runs of letters, digits and combining marks, of any script."""
    text = unicodedata.normalize("NFKC", caption).lower()
    return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()


@lru_cache(maxsize=65536)
def _word_vector(word: str, dim: int, seed: int) -> np.ndarray:
    """A vector (dim,) float32 of root mean square 1 from the bytes of a hash, so the same in every process, version and
    machine."""
    data = hashlib.shake_256(f"{seed}:{word}".encode()).digest(4 * dim)
    vector = np.frombuffer(data, "<u4").astype(np.float64) / 2**31 - 1
    return (vector / np.sqrt(np.mean(vector**2))).astype(np.float32)


class WordHashEncoder(ModelMixin, ConfigMixin):
    """A begin token and one vector per word: a frozen random direction (from a hash of the word, so there is no
    vocabulary) plus sinusoids of its position. Nothing is learned here; the transformer's text projection learns what
    the directions mean. Suits small vocabularies of captions; it does not know that two words are similar.
    """

    @register_to_config
    def __init__(self, dim: int = 256, max_tokens: int = 64, seed: int = 0) -> None:
        super().__init__()
        if dim < 2 or dim % 2 or max_tokens < 1:
            raise UserError(f"dim must be even and max_tokens at least 1, got {dim} and {max_tokens}")
        self.num_truncated = 0  # captions so far that were longer than `max_tokens`
        self.register_buffer("anchor", torch.zeros(()))  # the only tensor: it has the device, and it is saved

    @property
    def dim(self) -> int:
        return int(self.config.dim)

    @property
    def fingerprint(self) -> str:
        settings = {key: self.config[key] for key in ("dim", "max_tokens", "seed")}
        return fingerprint({}, {"class": "WordHashEncoder", "version": 1} | settings)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`. Words beyond `max_tokens` - 1 are dropped, with a warning in the log."""
        config = self.config
        rows = [[BEGIN, *split_words(caption)] for caption in captions]
        truncated = [len(row) > config.max_tokens for row in rows]
        self.num_truncated += _warn_truncated(captions, truncated, config.max_tokens - 1, "words")
        longest = min(max(map(len, rows)), config.max_tokens)
        position = get_timestep_embedding(torch.arange(longest), config.dim)
        embeds = torch.zeros(len(rows), longest, config.dim)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            words = [_word_vector(word, config.dim, config.seed) for word in row[:longest]]
            embeds[i, :len(words)] = torch.from_numpy(np.stack(words)) + position[:len(words)]
            mask[i, :len(words)] = True
        return embeds.to(self.anchor.device), mask.to(self.anchor.device)


def _warn_truncated(captions: Sequence[str], truncated: Sequence[bool], limit: int, unit: str) -> int:
    """Log which captions are truncated; return how many."""
    longer = [caption for caption, too_long in zip(captions, truncated, strict=True) if too_long]
    if longer:
        logger.warning("%d of %d captions truncated to %d %s: %s%s", len(longer), len(captions), limit, unit,
                       longer[0], " ..." if len(longer) > 1 else "")
    return len(longer)


class TransformersEncoder:
    """The last hidden states of a transformers encoder, frozen.

    Args:
        model: an encoder (`transformers.PreTrainedModel`) whose output has `last_hidden_state`.
        tokenizer: its tokenizer; captions are truncated to its `model_max_length`, at most `max_tokens`.
        lower: lower-case and strip captions first.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = 256, *, lower: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.max_tokens, self.lower = min(tokenizer.model_max_length, max_tokens), lower
        self.num_truncated = 0  # captions so far that were longer

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> TransformersEncoder:
        """Load from a folder or by a hub name; of an encoder-decoder only the encoder is kept. Reads only safetensors,
        runs no code from the folder. Raises UserError if there is no such model."""
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

        try:
            config = AutoConfig.from_pretrained(name_or_path).get_text_config()
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            family = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
            model = family.from_pretrained(name_or_path, config=config, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load a text encoder from {name_or_path}: {error}. Give a folder (or the hub "
                            "name of one) with config.json, model.safetensors and the tokenizer's files") from error
        if config.is_encoder_decoder and family is AutoModel:
            model = model.get_encoder()
        return cls(model, tokenizer)

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """Reads every weight once."""
        config = self.model.config.to_dict()
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)  # where it was and what loaded it, not what it is
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return fingerprint(self.model.state_dict(), {"config": config, "vocabulary": vocabulary, "rules": self._rules(),
                                                     "max_tokens": self.max_tokens}
                           | ({"lower": True} if self.lower else {}))

    def _rules(self) -> dict[str, Any]:
        """How the tokenizer gets from text to its vocabulary: normalization, splitting, merges, special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # tokenizers in pure Python have none
        rules = {} if backend is None else json.loads(backend.to_str())
        return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}  # set by each call

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`. Tokens beyond `max_tokens` are dropped, with a warning in the log."""
        upcast_unsupported([self.model])
        captions = [caption.lower().strip() for caption in captions] if self.lower else captions
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        truncated = [length > self.max_tokens for length in lengths]
        self.num_truncated += _warn_truncated(captions, truncated, self.max_tokens, "tokens")
        tokens = self.tokenizer(list(captions), padding="longest", truncation=True, max_length=self.max_tokens,
                                padding_side="right", return_tensors="pt")
        ids, mask = tokens["input_ids"].long(), tokens["attention_mask"].bool()
        if not ids.shape[1]:  # only "" and a tokenizer that adds no special token
            ids = torch.full((len(captions), 1), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, 0] |= ~mask.any(1)
        if self.model.device.type != "meta":  # else it is offloaded, and its hook moves the inputs
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float(), mask


def on_accelerator(encoder: TextEncoder) -> AbstractContextManager[None]:
    """Let an encoder with weights compute on the accelerator inside the block, if there is one."""
    return module_on_accelerator(encoder.model) if isinstance(encoder, TransformersEncoder) else nullcontext()


def load_text_encoder(name_or_path: str | Path | None = None) -> WordHashEncoder | TransformersEncoder:
    """Load the built-in encoder (None, or a folder where one was saved) or one of transformers (folder or hub name)."""
    if name_or_path is None:
        return WordHashEncoder().eval()
    config = Path(name_or_path) / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == "WordHashEncoder":
        return WordHashEncoder.from_pretrained(name_or_path)
    return TransformersEncoder.from_pretrained(name_or_path)
