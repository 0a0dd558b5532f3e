"""Load a video or image VAE from the folder it was saved to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model import AutoencoderKLODVAE
from ..utils.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CLASSES = ("AutoencoderKLODVAE", "AutoencoderKL")


def load_vae(folder: Path | str) -> AutoencoderKLODVAE | AutoencoderKL:
    """Load a video VAE or an image VAE from a folder written by `save_pretrained`, in float32.

    Raises:
        UserError: there is none, or one of another class.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a VAE's folder: it has no config.json. Give a folder written by "
                        f"`odvae train` (its `vae`) or by save_pretrained")
    name = AutoencoderKLODVAE.load_config(path).get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{path}/config.json describes a {name}; expected one of {sorted(CLASSES)}")
    cls: Any = AutoencoderKLODVAE
    if name == "AutoencoderKL":
        from diffusers import AutoencoderKL  # imports most of diffusers, which takes seconds

        cls = AutoencoderKL
    try:
        vae: AutoencoderKLODVAE | AutoencoderKL = cls.from_pretrained(
            path, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the VAE in {path}: {error}") from error
    return vae
