"""Embeddings of a number: a noise level, an interval of noise levels, a guidance scale."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor

FEATURES = 256  # sinusoids that encode a number


class ScalarEmbedding(TimestepEmbedding):
    """Sinusoids of wavelengths from 2 pi / `scale` on, and an MLP."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__(FEATURES, dim)
        self.scale = scale

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed numbers of any shape (...) -> (..., dim), computed in `dtype`."""
        sinusoids = get_timestep_embedding(values.flatten() * self.scale, FEATURES, flip_sin_to_cos=True,
                                           downscale_freq_shift=0)
        embedded: Tensor = super().forward(sinusoids.to(dtype)).view(*values.shape, -1)
        return embedded
