"""The VAE's loss (OD-VAE, section 3.5): its config, and the reconstruction and KL terms, which need no network."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..utils.config import Config
from .adversarial import AdversarialConfig
from .latents import EquivarianceConfig, FutureDroppingConfig, LatentMaskingConfig, LocalCorrelationConfig
from .perceptual import PerceptualConfig


class LossConfig(Config):
    """Every term is a mean, so that weights keep their meaning across sizes and lengths.

    The public code sums instead: |x - y| plus LPIPS over the values of a frame, the KL (weight 1e-6) over the latent
    values of a clip. Divided by the 3HW values of a frame that is l1 = 1, perceptual = 1 and

        kl = 1e-6 (latent values of a clip) / 3HW = 1e-6 c (1 + (T-1)/4) / 192

    for c channels at 4x8x8: 1.46e-7 for 4 channels and 25 frames. Its clamp of the adaptive weight, 1e4, divides too:
    adversarial.max_adaptive = 1e4 / 3HW, 0.051 at 256x256.
    """

    l1: float = Field(1.0, ge=0)  # weight of |x - y|, mean over all values
    l2: float = Field(0.0, ge=0)  # weight of (x - y)^2, mean over all values
    kl: float = Field(1e-6, ge=0)  # weight of the KL divergence from N(0, 1), mean over latent values; see above
    perceptual: PerceptualConfig = PerceptualConfig()  # the paper's weight: 1
    adversarial: AdversarialConfig = AdversarialConfig()  # the paper's weight: 0.5
    # Latents that a diffusion model learns fast; see `latents`. All but the first cost a pass of the decoder, the
    # latents' equivariance one of the encoder.
    local_correlation: LocalCorrelationConfig = LocalCorrelationConfig()
    latent_masking: LatentMaskingConfig = LatentMaskingConfig()
    future_dropping: FutureDroppingConfig = FutureDroppingConfig()
    latent_equivariance: EquivarianceConfig = EquivarianceConfig()
    decoder_equivariance: EquivarianceConfig = EquivarianceConfig()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each latent value: 1/2 (mean^2 + var - 1 - log var)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def pixel_error(video: Tensor, decoded: Tensor, config: LossConfig) -> Tensor:
    """Return the weighted sum of L1 and L2 between two videos of one shape."""
    error = decoded.float() - video.float()
    return config.l1 * error.abs().mean() + config.l2 * error.square().mean()


def reconstruction_loss(video: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor,
                        config: LossConfig) -> dict[str, Tensor]:
    """Return the weighted sum as "loss", and its terms by name."""
    error = decoded.float() - video.float()
    l1, l2, kl = error.abs().mean(), error.square().mean(), kl_divergence(mean.float(), logvar.float()).mean()
    return {"loss": config.l1 * l1 + config.l2 * l2 + config.kl * kl, "l1": l1, "l2": l2, "kl": kl}
