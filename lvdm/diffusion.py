"""Denoising diffusion (2006.11239): the forward process, the model's targets, and the weights of the loss.

x_t = sqrt(a) x_0 + sqrt(1 - a) e with a = alphas_cumprod[t] of the schedule, near 0 at the last t; the model predicts
the noise e, or v = sqrt(a) e - sqrt(1 - a) x_0 (2202.00512).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]  # as diffusers' schedulers call them


def _roots(alpha: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) of (B,) values, shaped to multiply a (B, c, T, h, w) latent."""
    alpha = alpha[:, None, None, None, None].to(like.dtype)
    return alpha.sqrt(), (1 - alpha).sqrt()


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) e for x0, noise (B, c, T, h, w) and `alpha` (B,)."""
    signal, sigma = _roots(alpha, x0)
    return signal * x0 + sigma * noise


def target(x0: Tensor, noise: Tensor, alpha: Tensor, prediction: PredictionType) -> Tensor:
    """What the model is to predict from x_t."""
    if prediction == "epsilon":
        return noise
    signal, sigma = _roots(alpha, x0)
    return signal * noise - sigma * x0


def min_snr_weight(alpha: Tensor, prediction: PredictionType, gamma: float) -> Tensor:
    """Min-SNR (2303.09556): weigh the loss of x_0 by min(SNR, gamma), SNR = a / (1 - a), so that light noise does not
    dominate. In terms of the loss of e that is min(1, gamma / SNR), of v min(SNR, gamma) / (SNR + 1)."""
    if prediction == "epsilon":
        return (gamma * (1 - alpha) / alpha).clamp(max=1.0)
    return (gamma * (1 - alpha)).minimum(alpha)
