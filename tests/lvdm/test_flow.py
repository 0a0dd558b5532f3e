"""The flow's closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from lvdm import flow


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_runs_from_data_to_noise_with_constant_velocity():
    x0, noise = torch.randn(2, 2, 3, 4, 5, 4, generator=generator()).double()
    ones = torch.ones(2, 4, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x0, noise, 0 * ones), x0)
    assert torch.equal(flow.interpolate(x0, noise, ones), noise)
    slope = (flow.interpolate(x0, noise, 0.7 * ones) - flow.interpolate(x0, noise, 0.2 * ones)) / 0.5
    torch.testing.assert_close(slope, flow.velocity(x0, noise))
    t = torch.rand(2, 4, generator=generator()).double()  # each frame has its own time
    for b in range(2):
        for k in range(4):
            torch.testing.assert_close(flow.interpolate(x0, noise, t)[b, :, k],
                                       (1 - t[b, k]) * x0[b, :, k] + t[b, k] * noise[b, :, k])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_with_the_exact_velocity_of_a_point_mass_lands_on_it(shift):
    x0, x = torch.randn(2, 8, generator=generator()).double()
    times = flow.timesteps_schedule(7, shift).double()
    for t, after in pairwise(times):
        x = x + (after - t) * (x - x0) / t  # E[e - x_0 | x_t] = (x_t - x_0) / t
    torch.testing.assert_close(x, x0)


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_schedule_falls_from_one_to_zero(shift):
    times = flow.timesteps_schedule(20, shift)
    assert times.shape == (21,) and times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()
    middle = shift / (1 + shift)
    assert times[10].item() == pytest.approx(middle, abs=1e-6)


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.5, 0.7, 3.0)])
def test_timesteps_have_the_quantiles_of_a_shifted_logit_normal(mean, std, shift):
    t = flow.sample_timesteps(generator(), (200, 200), mean, std, shift).flatten()
    assert t.min() > 0 and t.max() < 1
    for z, share in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345)):
        plain = 1 / (1 + math.exp(-(mean + std * z)))
        expected = shift * plain / (1 + (shift - 1) * plain)
        assert (t < expected).float().mean().item() == pytest.approx(share, abs=0.01)


def draw(count: int, groups: tuple[int, ...], **regimes: float) -> torch.Tensor:
    """(count, T): of each sample its own generator, as in training."""
    return torch.stack([flow.noise_levels(generator(i), groups, regimes).t for i in range(count)])


def test_noise_levels_are_equal_in_a_group_and_low_in_a_prefix():
    levels = draw(3000, (1, 2, 2, 1), prefix=1.0)
    assert levels.shape == (3000, 6) and levels.min() >= 0 and levels.max() < 1
    assert torch.equal(levels[:, 1], levels[:, 2]) and torch.equal(levels[:, 3], levels[:, 4])
    each = levels[:, [0, 1, 3, 5]]
    same = (each[:, 1:] == each[:, :1]).float()
    assert (each[:, 0] <= 0.1).all()  # at least one group is history
    assert torch.equal(same, same.cummin(dim=1).values)  # the rest of the history is a prefix, at the same level
    assert same.sum(1).unique().tolist() == [0, 1, 2]  # and never all there is
    torch.testing.assert_close(same.mean(0), torch.tensor([2 / 3, 1 / 3, 0.0]), atol=0.03, rtol=0)


def test_regimes_have_their_frequencies():
    plain = draw(3000, (1, 2), group=1.0)
    assert abs(torch.corrcoef(plain[:, :2].T)[0, 1]) < 0.06
    assert (draw(200, (1, 2), clip=2.0).std(1) == 0).all()
    mixed = draw(3000, (1, 2), clip=1.0, group=1.0, prefix=2.0)
    clip, group = (mixed[:, 0] == mixed[:, 1]), (mixed == plain).all(1)
    assert clip.float().mean().item() == pytest.approx(1 / 4, abs=0.03)
    assert group.float().mean().item() == pytest.approx(1 / 4, abs=0.03)
    assert torch.equal(mixed[~clip, 2], plain[~clip, 2])
    image = draw(3000, (1,), prefix=1.0)
    assert image.median().item() == pytest.approx(0.5, abs=0.03)


def test_quantiles_match_the_sampled_timesteps():
    t = flow.sample_timesteps(generator(), (40_000,), 0.5, 0.7, 3.0)
    for q in (0.1, 0.5, 0.9):
        assert (t < flow.timestep_quantile(q, 0.5, 0.7, 3.0)).float().mean().item() == pytest.approx(q, abs=0.01)


def test_rescaled_guidance_has_the_conditional_samples_contrast():
    g = torch.Generator().manual_seed(3)
    x, cond, null = (torch.randn(2, 3, 2, 4, 4, generator=g) for _ in range(3))
    t, guided = 0.6, torch.lerp(null, cond, 3.0)
    assert flow.rescale_guidance(x, t, cond, guided, 0.0) is guided
    clean, expected = (x - t * v for v in (flow.rescale_guidance(x, t, cond, guided, 1.0), cond))
    torch.testing.assert_close(clean.std((2, 3, 4)), expected.std((2, 3, 4)))
    torch.testing.assert_close(clean.mean((2, 3, 4)), (x - t * guided).mean((2, 3, 4)))
    torch.testing.assert_close(flow.rescale_guidance(x, t, cond, cond, 1.0), cond)


@pytest.mark.parametrize(("scale", "reference"), [(-2.0, 0), (0.0, 0), (0.4, 0.4), (1.0, 1), (3.0, 1)])
def test_rescaling_removes_only_contrast_added_by_guidance(scale, reference):
    torch.manual_seed(0)
    x, null, cond = torch.randn(3, 2, 4, 3, 8, 8)
    guided, target = flow.guide(null, cond, scale)
    torch.testing.assert_close(guided, null + scale * (cond - null))
    torch.testing.assert_close(target, null + reference * (cond - null))
    clean = x - 0.6 * flow.rescale_guidance(x, 0.6, target, guided, 1.0)
    torch.testing.assert_close(clean.std((2, 3, 4)), (x - 0.6 * (null + reference * (cond - null))).std((2, 3, 4)),
                               atol=1e-4, rtol=1e-4)
