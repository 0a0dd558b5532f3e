"""The terms that make latents easy to learn: closed forms, and draws as a function of seed, step and micro-batch."""

import pytest
import torch
import torch.nn.functional as F

from odvae.losses import latents as terms
from odvae.losses.latents import (
    EquivarianceConfig,
    FutureDroppingConfig,
    LatentMaskingConfig,
    LocalCorrelationConfig,
    latent_losses,
)
from odvae.losses.reconstruction import LossConfig, pixel_error
from odvae.utils.seeding import generator

CONFIG = LossConfig(l1=0.5, l2=2.0)


def error(x, y):
    return pixel_error(x, y, CONFIG)


def pool(video):
    """An encoder that scales with the picture: means of 8x8 pixels."""
    return F.avg_pool3d(video, (1, 8, 8))


def unpool(latents):
    """Its decoder, exact for videos of 8x8 squares."""
    return latents.repeat_interleave(8, 3).repeat_interleave(8, 4)


def losses_of(video, mean, decode=unpool, encode=pool, **config):
    return latent_losses(config, video, mean, mean, encode=encode, decode=decode, error=error,
                         draw=lambda term: generator(0, term, 0, 0))


def test_correlation_of_constant_opposite_and_independent_latents():
    one = torch.randn(2, 8, 1, 1, 1).expand(-1, -1, 5, 4, 4)
    assert terms.local_correlation(one, (2, 2, 2)) == pytest.approx(1, abs=1e-4)
    rows = torch.tensor([1.0, -1.0]).repeat(2)[:, None]  # neighbours in a column are opposite: 2 of 6 pairs agree
    assert terms.local_correlation(one[:, :, :1] * rows, (2, 2, 2)) == pytest.approx((2 - 4) / 6, abs=1e-4)
    noise = torch.randn(4, 64, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    assert terms.local_correlation(noise, (2, 2, 2)) == pytest.approx(0, abs=0.005)


def test_correlation_is_the_mean_over_pairs_of_a_window():
    z = torch.randn(1, 6, 3, 2, 2, dtype=torch.float64)
    pairs = []
    for frames in (z[0, :, :1], z[0, :, 1:]):
        r = torch.corrcoef(frames.flatten(1).T)
        pairs.append(r[~torch.eye(len(r), dtype=torch.bool)].mean())
    expected = (pairs[0] + 2 * pairs[1]) / 3  # by latent frames; the first has windows of its own
    assert terms.local_correlation(z, (2, 2, 2)) == pytest.approx(float(expected), abs=1e-5)


def test_correlation_costs_nothing_above_its_target():
    one = torch.randn(1, 8, 1, 1, 1).expand(-1, -1, 3, 4, 4)
    video = unpool(one)
    for target, loss in ((0.75, 0.0), (1.0, 0.0)):
        (value,) = losses_of(video, one, local_correlation=LocalCorrelationConfig(target=target)).values()
        assert float(value) == pytest.approx(loss, abs=1e-4)
    assert terms.local_correlation(one[..., :1, :1][:, :, :1], (2, 2, 2)) == 0  # no two positions


def test_nothing_masked_is_the_plain_loss_and_all_masked_is_that_of_zeros():
    video = torch.randn(2, 3, 3, 16, 16)
    for ratio, decoded in (((0.0, 0.0), unpool(pool(video))), ((1.0, 1.0), torch.zeros_like(video))):
        (value,) = losses_of(video, pool(video), latent_masking=LatentMaskingConfig(ratio=ratio)).values()
        assert value == error(video, decoded)
    mask = terms.position_mask(torch.zeros(64, 5, 4, 8, 8), (0.2, 0.4), generator(0, "mask"))
    assert mask.shape == (64, 1, 4, 8, 8) and mask.float().mean() == pytest.approx(0.7, abs=0.02)
    assert 0.5 < mask.float().mean(dim=(1, 2, 3, 4)).min() < 0.65  # the samples differ


def test_dropped_futures_keep_the_first_latent_and_drop_the_last():
    mask = terms.past_mask(torch.zeros(200, 4, 5, 2, 2), generator(0, "past")).flatten(1)
    assert mask[:, 0].all() and not mask[:, -1].any()
    assert set(mask.sum(1).tolist()) == {1, 2, 3, 4}
    assert all((row.int().diff() <= 0).all() for row in mask)

    still = torch.randn(1, 3, 1, 16, 16).expand(-1, -1, 3, -1, -1)  # a decoder that repeats the first frame is right
    config = FutureDroppingConfig(motion=5)
    (value,) = losses_of(unpool(pool(still)), pool(still), future_dropping=config,
                         decode=lambda z: unpool(z[:, :, :1].expand_as(z))).values()
    assert float(value) == pytest.approx(0, abs=1e-6)
    (image,) = losses_of(still[:, :, :1], pool(still[:, :, :1]), future_dropping=config).values()
    assert image == 0


def test_a_repeated_frame_pays_for_the_motion_it_misses():
    ramp = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 3, 3, 16, 16)  # moves by 1 a frame
    value = terms.future_error(ramp, ramp[..., ::8, ::8], torch.ones(1, 1, 3, 1, 1), 7.0,
                               lambda z: unpool(z[:, :, :1].expand_as(z)), error)
    assert value == error(ramp, torch.zeros_like(ramp)) + 7.0


def test_scaling_averages_areas():
    x = torch.randn(2, 3, 4, 12, 8)
    assert torch.allclose(terms.scale(x, 6, 4), F.avg_pool3d(x, (1, 2, 2)), atol=1e-6)
    assert torch.allclose(terms.scale(x, 12, 8), x, atol=1e-6)
    matrix = terms.box_matrix(7, 5)
    assert torch.allclose(matrix.sum(1), torch.ones(5)) and torch.allclose(matrix.sum(0), torch.full((7,), 5 / 7))


def test_a_map_that_scales_with_the_picture_has_no_loss():
    squares = unpool(torch.randn(2, 3, 3, 4, 4).repeat_interleave(2, 3).repeat_interleave(2, 4))  # 16x16 pixels
    half = {"latent_equivariance": EquivarianceConfig(), "decoder_equivariance": EquivarianceConfig()}
    size = (4, 4)  # half; for other sizes squares straddle latents
    assert terms.latent_equivariance(squares, pool(squares), size, pool) < 1e-9
    assert terms.decoder_equivariance(squares, pool(squares), size, unpool, error) < 1e-5
    for value in losses_of(squares, pool(squares), encode=lambda x: pool(x).roll(1, 3),
                           decode=lambda z: unpool(z.flip(3)), **half).values():
        assert value > 0.1


def test_latent_equivariance_does_not_depend_on_the_scale_of_the_latents():
    video = unpool(torch.randn(1, 3, 3, 4, 4))
    one, tiny = (terms.latent_equivariance(video, s * pool(video).flip(3), (3, 2), lambda x, s=s: s * pool(x).flip(4))
                 for s in (1.0, 0.1))
    assert one > 0.1 and float(tiny) == pytest.approx(float(one), rel=2e-2)


def test_sizes_are_smaller_and_draws_a_function_of_their_arguments():
    latents = torch.zeros(1, 4, 1, 8, 1)
    sizes = {terms.draw_size(latents, 0.5, generator(0, "size", i)) for i in range(100)}
    assert sizes == {(height, 1) for height in (4, 5, 6, 7)}
    one, again, other = (terms.position_mask(torch.zeros(2, 4, 3, 8, 8), (0, 1), generator(*key))
                         for key in ((0, "m", 3, 1), (0, "m", 3, 1), (0, "m", 3, 2)))
    assert one.equal(again) and not one.equal(other)
