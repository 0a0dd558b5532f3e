"""What identifies a VAE: the values that its encoder gives follow from it."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch

from ..utils.files import fingerprint

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of stored latents
Dtype = Literal["float16", "bfloat16", "float32"]


def vae_config(vae: Any) -> dict[str, Any]:
    """What of a VAE's config tells what its encoder says.

    Private keys do not count, and latents_mean and latents_std do not: they are measured on a cache. Nor do values that
    are the class's defaults, so that an option that a later version adds does not make every cache another VAE's.
    """
    defaults = {name: field.default for name, field in inspect.signature(type(vae).__init__).parameters.items()}
    return {key: _plain(value) for key, value in dict(vae.config).items()
            if not key.startswith("_") and key not in ("latents_mean", "latents_std")
            and _plain(value) != _plain(defaults.get(key, inspect.Parameter.empty))}


def vae_fingerprint(vae: Any) -> str:
    """SHA-256 of a VAE's stored tensors and of `vae_config`."""
    return fingerprint(vae.state_dict(), vae_config(vae))


def _plain(value: Any) -> Any:
    """A tuple and a list are the same in a config."""
    return list(value) if isinstance(value, tuple) else value
