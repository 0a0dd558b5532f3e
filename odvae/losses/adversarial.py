"""The adversarial term: a 3D PatchGAN, hinge losses, and the weight that balances them with the reconstruction.

Isola et al. 2017 (PatchGAN), Lim & Ye 2017 (hinge), Esser et al. 2021 (adaptive weight), Miyato et al. 2018 (spectral
norm), Mescheder et al. 2018 (R1). Users of the public OD-VAE report NaN after 30-50k adversarial steps: spectral norm
(on by default), optional R1 and the clamp of the adaptive weight keep the critic stable here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..trainer.optim import OptimizerConfig
from ..trainer.trainer import Objective
from ..utils.config import Config
from .terms import TermConfig


class CriticConfig(Config):
    width: int = Field(64, ge=1)  # channels after the first convolution
    layers: int = Field(3, ge=1)  # convolutions that halve height and width
    spectral_norm: bool = True  # instead of GroupNorm; keeps the critic 1-Lipschitz, so that it cannot diverge
    gradient_penalty: float = Field(0.0, ge=0)  # R1: weight of |d critic / d real|^2 / 2; costs a second backward
    optimizer: OptimizerConfig = OptimizerConfig(betas=(0.5, 0.9), weight_decay=0.0)


class AdversarialConfig(TermConfig):
    max_adaptive: float = Field(1e4, gt=0)  # the adaptive weight is clamped to [0, this]
    critic: CriticConfig = CriticConfig()


class PatchDiscriminator(nn.Module):
    """Videos (B, 3, T, H, W), T from 1, H and W from 2^layers, to a score for each patch (B, 1, t, h, w).

    The first convolution halves only space, so that short clips and images keep their temporal resolution.
    """

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()

        def conv(in_channels: int, out_channels: int, stride: tuple[int, int, int]) -> nn.Module:
            layer = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
            return spectral_norm(layer) if config.spectral_norm else layer

        layers: list[nn.Module] = [conv(3, config.width, (1, 2, 2)), nn.LeakyReLU(0.2)]
        width = config.width
        for i in range(1, config.layers + 1):
            next_width = config.width * min(8, 2**i)
            layers.append(conv(width, next_width, (2, 2, 2) if i < config.layers else (1, 1, 1)))
            if not config.spectral_norm:
                layers.append(nn.GroupNorm(1, next_width))  # batch norm would need synchronised processes
            layers.append(nn.LeakyReLU(0.2))
            width = next_width
        self.layers = nn.Sequential(*layers, conv(width, 1, (1, 1, 1)))

    def forward(self, video: Tensor) -> Tensor:
        scores: Tensor = self.layers(video)
        return scores


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 E[max(0, 1 - D(x))] + 1/2 E[max(0, 1 + D(y))], of scores."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, maximum: float) -> Tensor:
    """|grad reconstruction| / |grad adversarial| at the decoder's last layer, in [0, maximum], without a gradient."""
    rec_norm, adv_norm = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
                          for loss in (reconstruction, adversarial))
    return (rec_norm / (adv_norm + 1e-4)).clamp(0, maximum).detach()


class DiscriminatorObjective(Objective):
    """The critic's objective. Its batch is (2, B, 3, T, H, W): the real videos and their reconstructions."""

    non_muon_pattern = r"."  # Muon's orthogonal updates do not suit a critic

    model: PatchDiscriminator

    def __init__(self, config: CriticConfig, start_step: int) -> None:
        super().__init__()
        self.model, self.config = PatchDiscriminator(config), config
        self.optimizer, self.start_step = config.optimizer, start_step

    def forward(self, batch: Tensor, step: int, micro_batch: int) -> dict[str, Tensor]:
        penalised = self.config.gradient_penalty > 0
        real_video, fake_video = batch.detach()
        real_video.requires_grad_(penalised)
        real, fake = self.model(torch.cat([real_video, fake_video])).float().chunk(2)
        losses = {"critic": hinge_critic_loss(real, fake), "critic_real": real.mean(), "critic_fake": fake.mean()}
        losses["loss"] = losses["critic"]
        if penalised:
            losses["critic_penalty"] = gradient_penalty(real, real_video)
            losses["loss"] = losses["loss"] + self.config.gradient_penalty * losses["critic_penalty"]
        return losses

    def generator_loss(self, decoded: Tensor) -> Tensor:
        """Return the decoder's loss -E[D(y)]; no gradient reaches the critic, which learns only in its own step."""
        with _frozen(self.model):
            return -self.model(decoded).float().mean()


def gradient_penalty(scores: Tensor, videos: Tensor) -> Tensor:
    """R1: 1/2 E |grad D(x)|^2, D(x) being the mean of a video's scores."""
    (grad,) = torch.autograd.grad(scores.flatten(1).mean(dim=1).sum(), videos, create_graph=True)
    return 0.5 * grad.float().square().flatten(1).sum(dim=1).mean()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
