"""Identify a VAE by what determines its latents."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch

from ..utils.files import fingerprint

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of stored latents
Dtype = Literal["float16", "bfloat16", "float32"]


def vae_config(vae: Any) -> dict[str, Any]:
    """Return the part of a VAE's config that determines its latents.

    Leaves out private keys; latents_mean and latents_std, which are measured after training; and values equal to the
    class's defaults, so that a new option in a later version does not invalidate every cache.
    """
    defaults = {name: field.default for name, field in inspect.signature(type(vae).__init__).parameters.items()}
    return {key: _plain(value) for key, value in dict(vae.config).items()
            if not key.startswith("_") and key not in ("latents_mean", "latents_std")
            and _plain(value) != _plain(defaults.get(key, inspect.Parameter.empty))}


def vae_fingerprint(vae: Any) -> str:
    """Return the SHA-256 of a VAE's stored tensors and of `vae_config`."""
    return fingerprint(vae.state_dict(), vae_config(vae))


def _plain(value: Any) -> Any:
    """Make tuples and lists equal."""
    return list(value) if isinstance(value, tuple) else value
