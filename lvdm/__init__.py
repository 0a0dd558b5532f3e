"""LVDM: a latent video diffusion transformer, causal over groups of latent frames, and its pipeline."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from odvae import __version__

if TYPE_CHECKING:
    from .model.transformer import LVDMTransformer3DModel
    from .sampling.pipeline import LVDMPipeline

__all__ = ["LVDMPipeline", "LVDMTransformer3DModel", "__version__"]

_HOME = {"LVDMPipeline": "lvdm.sampling.pipeline", "LVDMTransformer3DModel": "lvdm.model.transformer"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import lvdm` alone loads neither torch nor diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module 'lvdm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
