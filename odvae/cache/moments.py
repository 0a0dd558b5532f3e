"""Mean and standard deviation of latents per channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Moments per channel of a set of latents; merging is exact (Chan et al. 1979)."""

    count: int  # values per channel
    mean: np.ndarray  # (c,)
    squares: np.ndarray  # (c,) sums of squared deviations from the mean

    @classmethod
    def of(cls, latent: np.ndarray) -> Moments:
        """Compute the moments of one latent (c, t, h, w)."""
        flat = latent.reshape(len(latent), -1).astype(np.float64)
        mean = flat.mean(1)
        return cls(flat.shape[1], mean, ((flat - mean[:, None]) ** 2).sum(1))

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        parts = list(parts)
        count = np.array([part.count for part in parts], np.float64)[:, None]
        means = np.stack([part.mean for part in parts])
        mean = (count * means).sum(0) / count.sum()
        squares = sum(part.squares for part in parts) + (count * (means - mean) ** 2).sum(0)
        return cls(int(count.sum()), mean, squares)

    @property
    def std(self) -> np.ndarray:
        deviation: np.ndarray = np.sqrt(self.squares / self.count)
        return deviation
