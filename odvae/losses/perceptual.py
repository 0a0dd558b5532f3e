"""The perceptual term: a distance between image features, frame by frame (OD-VAE, section 3.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from .terms import TermConfig


class PerceptualConfig(TermConfig):
    kind: Literal["efficientnet", "lpips"] = "efficientnet"  # efficientnet works offline; lpips needs weights
    weights: Path | None = None  # of the network; None: those of an installed package


class PerceptualLoss(nn.Module):
    """Mean distance between the frames of two videos (B, 3, T, H, W) in [-1, 1].

    `network`, which is frozen, maps two batches of images (N, 3, H, W) in [-1, 1] to distances (N,).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, video: Tensor, decoded: Tensor) -> Tensor:
        a, b = (rearrange(v, "b c t h w -> (b t) c h w") for v in (video, decoded))
        distance: Tensor = self.network(a, b)
        return distance.float().mean()


def make_perceptual(config: PerceptualConfig) -> PerceptualLoss:
    """Create the loss with the network of `config`. Raises UserError if its weights cannot be loaded."""
    from ..metrics.perceptual import load_perceptual

    return PerceptualLoss(load_perceptual(config.kind, config.weights))
