"""Load a video or image VAE from the folder it was saved to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model import AutoencoderKLODVAE
from ..model.distilled_decoder import DistilledDecoder
from ..utils.errors import UserError
from .adapters import AutoencoderAdapter

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


def load_decoder(folder: Path | str, vae: Any = None) -> DistilledDecoder:
    """Load a decoder that `odvae distill` wrote, in float32, for inference.

    Args:
        folder: the decoder's, or that of its run.
        vae: the video VAE, ours or diffusers', in whose place it decodes; None: it is not checked.

    Raises:
        UserError: there is none, or its latents have another shape than the VAE's.
    """
    path = Path(folder)
    path = path / "decoder" if (path / "decoder/config.json").is_file() else path
    if not (path / "config.json").is_file() or \
            DistilledDecoder.load_config(path).get("_class_name") != "DistilledDecoder":
        raise UserError(f"{folder} holds no distilled decoder; give the folder that `odvae distill` wrote")
    try:
        decoder: DistilledDecoder = DistilledDecoder.from_pretrained(path, torch_dtype=torch.float32,
                                                                     use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the decoder in {path}: {error}") from error
    if vae is not None:
        expected = AutoencoderAdapter(vae)
        channels = next(getattr(vae.config, name) for name in ("latent_channels", "z_dim") if name in vae.config)
        for what, mine, theirs in (("channels", decoder.latent_channels, channels),
                                   ("frames", decoder.temporal_compression_ratio, expected.temporal_compression),
                                   ("pixels a side", decoder.spatial_compression_ratio, expected.spatial_compression)):
            if mine != theirs:
                raise UserError(f"the decoder in {path} was distilled for latents of {mine} {what}, and the VAE's have "
                                f"{theirs}; distill one from this VAE")
    return decoder.eval().requires_grad_(False)
