"""Load a VAE, of video or of images, from the folder that it was saved to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model import AutoencoderKLODVAE
from ..utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

KINDS = ("AutoencoderKLODVAE", "AutoencoderKL")


def load_vae(folder: Path | str) -> AutoencoderKLODVAE | AutoencoderKL:
    """A video VAE or an image VAE from a folder that `save_pretrained` wrote, in float32.

    Raises:
        UserError: there is none, or one of another class.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a VAE's folder: it has no config.json. Give a folder written by "
                        f"`odvae train` (its `vae`) or by save_pretrained")
    name = AutoencoderKLODVAE.load_config(path).get("_class_name")
    if name not in KINDS:
        raise UserError(f"{path}/config.json describes a {name}; expected one of {sorted(KINDS)}")
    kind: Any = AutoencoderKLODVAE
    if name == "AutoencoderKL":
        from diffusers import AutoencoderKL  # with most of diffusers, which takes seconds

        kind = AutoencoderKL
    try:
        vae: AutoencoderKLODVAE | AutoencoderKL = kind.from_pretrained(
            path, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the VAE in {path}: {error}") from error
    return vae
