"""The small pretrained weights that ship: made by configs/odvae/demo_image.yaml and configs/odvae/demo.yaml."""

from pathlib import Path

DEMO_VAE = Path(__file__).parent / "demo"  # AutoencoderKLODVAE, 64x64 rendered clips
DEMO_IMAGE_VAE = Path(__file__).parent / "demo_image"  # diffusers' AutoencoderKL that it was inflated from
