"""The small shipped weights: pairs of an image VAE (diffusers' AutoencoderKL) and the OD-VAE inflated from it, trained
by configs/odvae/NAME_image.yaml and NAME.yaml."""

from pathlib import Path

WEIGHTS = Path(__file__).parent
DEMO_VAE, DEMO_IMAGE_VAE = WEIGHTS / "demo", WEIGHTS / "demo_image"  # 8 channels, rendered clips; the LVDM uses it
NATURAL_VAE, NATURAL_IMAGE_VAE = WEIGHTS / "natural", WEIGHTS / "natural_image"  # 16 channels, natural footage as well
