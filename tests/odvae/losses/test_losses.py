"""Loss terms against their closed forms, and where their gradients may go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from odvae.losses.adversarial import (
    CriticConfig,
    DiscriminatorObjective,
    PatchDiscriminator,
    adaptive_weight,
    gradient_penalty,
    hinge_critic_loss,
)
from odvae.losses.perceptual import PerceptualLoss
from odvae.losses.reconstruction import LossConfig, kl_divergence, reconstruction_loss
from odvae.losses.terms import TermConfig
from odvae.training.train import TrainConfig
from odvae.utils.config import load_config


def test_terms_rise_from_their_start():
    term = TermConfig(weight=0.5, start=10, ramp=4)
    assert [term.weight_at(step) for step in (0, 9, 10, 11, 13, 14, 999)] == [0, 0, 0.125, 0.25, 0.5, 0.5, 0.5]
    assert [TermConfig(weight=0.5, start=10).weight_at(step) for step in (9, 10)] == [0, 0.5]
    assert TermConfig(ramp=4).weight_at(7) == 0


def test_kl_and_reconstruction():
    mean, logvar = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, math.log(4.0)])
    torch.testing.assert_close(kl_divergence(mean, logvar), torch.tensor([0.0, 0.5, 0.5 * (3 - math.log(4))]))
    x = torch.zeros(1, 3, 1, 2, 2)
    losses = reconstruction_loss(x, x + 0.5, mean, logvar, LossConfig(l1=2, l2=4, kl=0))
    assert float(losses["loss"]) == pytest.approx(2 * 0.5 + 4 * 0.25)


def test_weights_of_the_public_code_as_means():
    """Its sums, divided by the values of a frame, are our means with converted weights; staged.yaml has them."""
    random = torch.Generator().manual_seed(0)
    video, decoded = torch.rand(2, 2, 3, 9, 16, 24, generator=random)
    mean, logvar = torch.randn(2, 2, 4, 3, 2, 3, generator=random)
    public = (video - decoded).abs().sum() / (2 * 9) + 1e-6 * kl_divergence(mean, logvar).sum() / 2

    def converted(channels: int, frames: int) -> float:
        return 1e-6 * channels * (1 + (frames - 1) / 4) / 192

    ours = reconstruction_loss(video, decoded, mean, logvar, LossConfig(kl=converted(4, 9)))["loss"]
    torch.testing.assert_close(ours * 3 * 16 * 24, public)
    staged = load_config(TrainConfig, Path(__file__).parents[3] / "configs/odvae/staged.yaml")
    for stage in staged.resolved_stages():
        longest = max(stage.data.windows(), key=lambda bucket: bucket.frames)
        assert stage.loss.kl == pytest.approx(converted(staged.model.latent_channels, longest.frames), rel=5e-3)
        assert (stage.loss.l1, stage.loss.l2, stage.loss.perceptual.weight) == (1, 0, 1)
    assert stage.loss.adversarial.weight == 0.5
    assert stage.loss.adversarial.max_adaptive == pytest.approx(1e4 / (3 * 256 * 256), rel=5e-3)


def test_hinge():
    assert float(hinge_critic_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0]))) == pytest.approx(0.5)
    assert float(hinge_critic_loss(torch.tensor([1.0]), torch.tensor([-1.0]))) == 0  # a margin apart: nothing to learn


def test_adaptive_weight_is_the_ratio_of_gradients_and_is_clamped():
    last = torch.ones(4, requires_grad=True)
    reconstruction, adversarial = (3 * last).sum(), (-0.5 * last).sum()
    weight = adaptive_weight(reconstruction, adversarial, last, 1e4)
    assert float(weight) == pytest.approx(6, rel=1e-3) and not weight.requires_grad
    assert float(adaptive_weight(reconstruction, adversarial, last, 2.0)) == 2
    assert float(adaptive_weight(reconstruction, (0 * last).sum(), last, 1e4)) == 1e4


def test_gradient_penalty_of_a_linear_critic():
    slope = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    videos = torch.zeros(2, 3, 2, 4, 4, requires_grad=True)
    penalty = gradient_penalty((videos * slope).sum(dim=(1, 2, 3, 4)).view(2, 1, 1, 1, 1), videos)
    torch.testing.assert_close(penalty, 0.5 * slope.square().sum())


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 1, 16, 16), (1, 3, 9, 32, 24)])
def test_discriminator_scores_patches_of_images_and_clips(shape, spectral):
    scores = PatchDiscriminator(CriticConfig(width=4, layers=3, spectral_norm=spectral))(torch.zeros(shape))
    assert scores.shape[:2] == (shape[0], 1) and scores.shape[3:] == (shape[3] // 8, shape[4] // 8)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_decoder_and_critic_learn_each_from_its_own_loss(penalty):
    critic = DiscriminatorObjective(CriticConfig(width=4, layers=2, gradient_penalty=penalty), start_step=0)
    decoded = torch.rand(2, 3, 5, 16, 16, requires_grad=True)
    critic.generator_loss(decoded).backward()
    assert decoded.grad is not None and decoded.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())

    decoded.grad = None
    losses = critic(torch.stack([torch.rand_like(decoded), decoded]), 0, 0)
    losses["loss"].backward()
    assert decoded.grad is None and all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())
    assert losses["loss"].item() >= losses["critic"].item()


class Brightness(nn.Module):
    """Stands in for a perceptual network: the difference in mean brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * (a.mean(dim=(1, 2, 3)) - b.mean(dim=(1, 2, 3))).abs()


def test_perceptual_is_the_mean_over_frames_through_a_frozen_network():
    video = torch.zeros(2, 3, 2, 8, 8)
    decoded = video.clone()
    decoded[0, :, 1] = 0.5  # one frame of four
    decoded.requires_grad_()
    loss = PerceptualLoss(Brightness())
    distance = loss(video, decoded)
    assert distance.item() == pytest.approx(2 * 0.5 / 4)
    distance.backward()
    assert decoded.grad is not None and decoded.grad[0, :, 1].abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())
