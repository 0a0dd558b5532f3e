"""The small shipped weights: pairs of an image VAE (diffusers' AutoencoderKL) and the OD-VAE inflated from it, trained
by configs/odvae/NAME_image.yaml and NAME.yaml; and a fast decoder, by distill_demo.yaml."""

from pathlib import Path

WEIGHTS = Path(__file__).parent
DEMO_VAE, DEMO_IMAGE_VAE = WEIGHTS / "demo", WEIGHTS / "demo_image"  # 8 channels, rendered clips; the LVDM uses it
DEMO_DECODER = WEIGHTS / "demo_decoder"  # of DEMO_VAE's latents; see `inference.loading.load_decoder`
NATURAL_VAE, NATURAL_IMAGE_VAE = WEIGHTS / "natural", WEIGHTS / "natural_image"  # 16 channels, natural footage as well
