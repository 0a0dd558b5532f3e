"""OD-VAE: a causal 3D video VAE that compresses 4x in time and 8x8 in space (arXiv 2409.01199)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.streaming import decode_stream, encode_stream
    from .inference.wan import AutoencoderKLWan
    from .model import AutoencoderKLODVAE

__all__ = ["AutoencoderKLODVAE", "AutoencoderKLWan", "__version__", "decode_stream", "encode_stream"]
__version__ = "0.1.0"  # of all three packages

_HOME = {"AutoencoderKLODVAE": ".model", "AutoencoderKLWan": ".inference.wan",
         "encode_stream": ".inference.streaming", "decode_stream": ".inference.streaming"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import odvae` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'odvae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
