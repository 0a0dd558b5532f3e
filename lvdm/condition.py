"""What a sample is conditioned on: text, a class, both or nothing. All other modules handle captions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from odvae.cache.text import TextEncoder
from odvae.utils.errors import UserError

from .model.transformer import LVDMTransformer3DModel


@dataclass(frozen=True)
class Condition:
    """The condition of B samples, as passed to the transformer: `transformer(latents, t, **condition.arguments)`."""

    text: Tensor | None = None          # (B, M, D)
    text_mask: Tensor | None = None     # (B, M) bool, False at padding
    class_labels: Tensor | None = None  # (B,)

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Condition:
        return Condition(**{name: value.to(device, non_blocking=non_blocking)
                            for name, value in self.arguments.items()})

    def select(self, index: Sequence[int]) -> Condition:
        """Select samples, in this order."""
        # Not value[index]: a list of numbers is copied to the device, which is waited for.
        return Condition(**{name: torch.stack([value[i] for i in index]) for name, value in self.arguments.items()})

    def concat(self, other: Condition) -> Condition:
        """Concatenate the samples with those of `other`; shorter text is padded."""
        longest = max((part.text.shape[1] for part in (self, other) if part.text is not None), default=0)
        others = other._padded(longest).arguments
        return Condition(**{name: torch.cat([value, others[name]])
                            for name, value in self._padded(longest).arguments.items()})

    def _padded(self, tokens: int) -> Condition:
        if self.text is None or self.text_mask is None:
            return self
        more = tokens - self.text.shape[1]
        return replace(self, text=pad(self.text, (0, 0, 0, more)), text_mask=pad(self.text_mask, (0, more)))


def embedded_condition(embeds: Tensor | None, mask: Tensor | None, count: int) -> Condition | None:
    """The condition of given embeddings (None: there are none), of 1 or as many samples as divide `count`.

    Raises:
        UserError: other shapes.
    """
    if embeds is None:
        return None
    if embeds.ndim != 3 or count % len(embeds):
        raise UserError(f"embeddings must be (B, M, D), got {tuple(embeds.shape)} for {count} videos")
    mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    repeats = 1 if len(embeds) == 1 else count // len(embeds)
    return Condition(embeds.float().repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0))


Conditioner = Callable[[Sequence[str]], Condition]  # captions -> condition; "" stands for no caption


def conditioner(transformer: LVDMTransformer3DModel,
                text: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None) -> Conditioner:
    """Return the function that turns captions into the condition of `transformer`. For classes, captions are their
    names.

    Args:
        text: captions -> vectors (B, N, D) and mask (B, N): `TextEncoder.encode`, or a cache of embeddings; None for a
            transformer without text.

    Raises:
        UserError: in the returned function, for a caption that is not a class; it names the nearest ones.
    """
    names = {name: label for label, name in enumerate(transformer.config.class_names)}

    def label(caption: str) -> int:
        if not caption:
            return transformer.no_class
        if caption not in names:
            near = difflib.get_close_matches(caption, names, 3, 0) or list(names)[:3]
            raise UserError(f"{caption!r} is not one of the {len(names)} classes of this model; the nearest are "
                            f"{', '.join(near)}")
        return names[caption]

    def condition(captions: Sequence[str]) -> Condition:
        labels = torch.tensor([label(caption) for caption in captions]) if names else None
        if text is None:
            return Condition(class_labels=labels)
        return Condition(*text(captions), labels)

    return condition


def check_text_encoder(transformer: LVDMTransformer3DModel, encoder: TextEncoder | None) -> None:
    """Raise UserError if the text encoder's width is not the transformer's."""
    expected, channels = transformer.config.text_dim, 0 if encoder is None else encoder.dim
    if channels != expected:
        raise UserError(f"the text encoder's states have {channels} channels, the transformer was made for {expected}: "
                        "load the components that it was trained with")
