"""The network: depends on torch, diffusers and einops, and does no I/O."""

from .autoencoder import AutoencoderKLODVAE

__all__ = ["AutoencoderKLODVAE"]
