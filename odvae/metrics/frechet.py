"""Frechet distance between two sets of features as Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..utils.errors import UserError
from .efficientnet import EfficientNetLite0

NAME = "Frechet distance (EfficientNet-Lite0)"


class Gaussian:
    """Running mean (D,) and covariance (D, D) of features, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of outer products about the mean

    def update(self, features: Tensor) -> None:
        """Add (N, D). Exact for any chunking (Chan, Golub & LeVeque 1979)."""
        features = features.detach().to("cpu", torch.float64)
        if not len(features):
            return
        mean, n = features.mean(0), len(features)
        centred, delta, total = features - mean, mean - self.mean, self.count + n
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises UserError below two samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}; give more videos")
        return self._scatter / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0.

    Biased upwards with fewer samples than dimensions: compare only values from equally many samples.
    """
    A, B = a.covariance, b.covariance
    root = _root(A)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()  # tr (A B)^(1/2): the same eigenvalues
    distance = (a.mean - b.mean).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(0.0, float(distance))


def _root(A: Tensor) -> Tensor:
    """Return the square root of a positive semidefinite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class FrechetFeatures(nn.Module):
    """One vector per video: (B, 3, T, H, W) in [-1, 1] -> (B, 1280), EfficientNet-Lite0's, averaged over the frames.

    Their Frechet distance has its own name (`NAME`) and is not comparable with FVD, whose I3D network sees motion: an
    average over frames ignores their order.
    """

    dim = 1280

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, video: Tensor) -> Tensor:
        features = self.network.pooled(rearrange(video, "b c t h w -> (b t) c h w"))
        return rearrange(features, "(b t) d -> b t d", b=len(video)).mean(1)
