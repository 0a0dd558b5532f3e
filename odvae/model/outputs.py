"""Output classes of the VAE, with the names and attributes of diffusers'. Those take four seconds to import, and sum a
video's KL divergence over all dimensions but its width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class DiagonalGaussianDistribution:
    """The posterior q(z|x) of a VAE: an independent Gaussian for each latent value (arXiv 1312.6114).

    Args:
        parameters: (B, 2c, ...): means, then log-variances.
        deterministic: set variances to 0: `sample` returns the means.

    Attributes:
        mean, logvar, std, var: (B, c, ...); logvar within [-30, 20].
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample (B, c, ...)."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the means (B, c, ...)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return KL(self || other) of each sample (B,), in nats, summed over its values; `other` defaults to a standard
        normal distribution. 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is None:
            values = self.mean**2 + self.var - 1 - self.logvar
        else:
            values = ((self.mean - other.mean) ** 2 + self.var) / other.var - 1 - self.logvar + other.logvar
        return 0.5 * values.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Return -log q(sample), in nats, summed over `dims`; None: all but the batch. 0 if deterministic."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        values = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * (values.flatten(1).sum(1) if dims is None else values.sum(dim=list(dims)))


@dataclass
class DecoderOutput(BaseOutput):
    """A decoded video.

    Attributes:
        sample: (B, 3, T, H, W), about [-1, 1].
    """

    sample: Tensor
