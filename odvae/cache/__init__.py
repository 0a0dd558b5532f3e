"""Latent caches: the latents of a collection of videos, encoded once (docs/cache-format.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inference.fingerprint import vae_fingerprint
    from .build.builder import build_cache
    from .build.report import BuildSummary
    from .build.settings import BuildSettings
    from .dataset import BucketBatches, LatentDataset
    from .reader import LatentCache

__all__ = ["BucketBatches", "BuildSettings", "BuildSummary", "LatentCache", "LatentDataset", "build_cache",
           "vae_fingerprint"]

_HOME = {"BuildSettings": ".build.settings", "BuildSummary": ".build.report", "build_cache": ".build.builder",
         "BucketBatches": ".dataset", "LatentDataset": ".dataset", "LatentCache": ".reader",
         "vae_fingerprint": "..inference.fingerprint"}


def __getattr__(name: str) -> Any:
    """Import on first use, as in `odvae`."""
    if name not in _HOME:
        raise AttributeError(f"module 'odvae.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
