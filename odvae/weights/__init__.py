"""The small pretrained weights that ship. configs/odvae/NAME_image.yaml and NAME.yaml made each pair: an image VAE
(diffusers' AutoencoderKL) and the OD-VAE that was inflated from it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent
DEMO_VAE, DEMO_IMAGE_VAE = WEIGHTS / "demo", WEIGHTS / "demo_image"  # 8 channels, rendered clips; the LVDM speaks it
NATURAL_VAE, NATURAL_IMAGE_VAE = WEIGHTS / "natural", WEIGHTS / "natural_image"  # 16 channels, natural footage as well
