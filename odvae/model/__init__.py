"""The network: knows torch, diffusers and einops, nothing of files."""

from .autoencoder import AutoencoderKLODVAE

__all__ = ["AutoencoderKLODVAE"]
