"""A latent cache: what a VAE's encoder says about a folder of videos, computed once."""

from __future__ import annotations

from .builder import BuildSummary, build_cache
from .format import vae_fingerprint
from .reader import LatentCache

__all__ = ["BuildSummary", "LatentCache", "build_cache", "vae_fingerprint"]
