"""Find which of the shipped VAEs made latents."""

from __future__ import annotations

from pathlib import Path

from ..utils.errors import UserError
from ..weights import DEMO_VAE, NATURAL_VAE
from .fingerprint import vae_fingerprint
from .loading import load_vae


def find_shipped_vae(fingerprint: str, where: str, option: str = "--vae") -> Path:
    """Return the folder of the shipped VAE with a fingerprint. Raises UserError, naming `where` the latents are and
    the `option` that gives a VAE, if they are another's."""
    for folder in (NATURAL_VAE, DEMO_VAE):
        if vae_fingerprint(load_vae(folder)) == fingerprint:
            return folder
    raise UserError(f"{where} holds latents of another VAE than the shipped ones: it was encoded by "
                    f"{fingerprint[:16]}; pass {option} with the folder of the VAE that encoded it")
