"""Prompts to embeddings, apart from sampling: a pipeline's text encoder may work alone, and be left out afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odvae.utils.errors import UserError

from ..text import TextEncoder
from .inputs import SamplingInputs


class PromptEncoderMixin:
    """A pipeline's `encode_prompt`."""

    @property
    def caption_encoder(self) -> TextEncoder | None:
        """The text encoder, with its tokenizer where it has one."""
        raise NotImplementedError

    def _encode_texts(self, prompts: Sequence[str], limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode prompts, cut to `limit` tokens: embeddings (B, M, D) and mask (B, M)."""
        encoder = self.caption_encoder
        if encoder is None:
            raise UserError("this pipeline has no text encoder, so there are no embeddings; give it prompt_embeds, or "
                            "load it with its text_encoder and tokenizer")
        embeds, mask = encoder.encode(list(prompts))
        return embeds[:, :limit], mask[:, :limit]

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str] | None = None, negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True, num_videos_per_prompt: int = 1, prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None, max_sequence_length: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Encode prompts to embeddings (B, M, D) and masks (B, M), and the negative ones likewise (None without
        guidance), as `__call__` takes them. It needs the text encoder and the tokenizer alone. Embeddings that are
        given are returned as they are.

        Args:
            device, dtype: None: those that the text encoder gives.

        Raises:
            UserError: no prompts, or no text encoder.
        """
        if prompt_embeds is None:
            if prompt is None:
                raise UserError("give either prompt or prompt_embeds")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_embeds_mask = self._encode_texts(
                [text for text in prompts for _ in range(num_videos_per_prompt)], max_sequence_length)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            given = negative_prompt or ""
            count = len(prompt_embeds) // num_videos_per_prompt
            negatives = [given] * count if isinstance(given, str) else list(given)
            negative_prompt_embeds, negative_prompt_embeds_mask = self._encode_texts(
                [text for text in negatives for _ in range(num_videos_per_prompt)], max_sequence_length)
        prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask = (
            _to(tensor, device, dtype) for tensor in (prompt_embeds, prompt_embeds_mask, negative_prompt_embeds,
                                                      negative_prompt_embeds_mask))
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    def _check_text(self, inputs: SamplingInputs) -> None:
        """Raise UserError where prompts must be encoded and no text encoder is there."""
        if self.caption_encoder is not None:
            return
        guided = inputs.guidance_scale != 1
        missing = [name for name, needed in (("prompt_embeds", True), ("negative_prompt_embeds", guided))
                   if needed and getattr(inputs, name) is None]
        if missing:
            raise UserError(f"this pipeline has no text_encoder; give it {' and '.join(missing)}, as encode_prompt of "
                            "a pipeline with one returns them")


def _to(tensor: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """Move a tensor, and cast it unless it is a mask."""
    if tensor is None:
        return None
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
