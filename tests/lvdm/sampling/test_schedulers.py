"""Schedulers of diffusers: our noise levels, convergence to the exact flow, and a seed per sample."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from lvdm.defaults import FLOW_SCHEDULERS
from lvdm.flow import resolution_shift, timesteps_schedule
from lvdm.sampling.schedulers import Solver, check_scheduler, make_scheduler, num_function_evaluations
from odvae.utils.errors import UserError

SPREAD = 0.3  # standard deviation of the data


def gaussian_velocity(x, t):
    """Velocity of the flow from N(0, 1) to N(0, SPREAD^2), which maps e to SPREAD * e."""
    return x * (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2)


def solve(scheduler, velocity, steps, noise, seeds=(0,), shift=1.0):
    solver, x = Solver(scheduler, timesteps_schedule(steps, shift), seeds, group=0), noise
    for index, t in enumerate(solver.sigmas):
        x = solver.step(index, x, velocity(x, t))
    return x


def noise(batch=1):
    return torch.randn(batch, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_follow_the_schedule(name, shift):
    scheduler = make_scheduler(name)
    sigmas = Solver(scheduler, timesteps_schedule(5, shift), [0], 0).sigmas
    assert len(sigmas) == num_function_evaluations(scheduler, 5)
    assert sorted(set(sigmas), reverse=True) == pytest.approx(timesteps_schedule(5, shift)[:-1].tolist(), abs=2e-6)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_straight_paths_are_exact_in_any_number_of_steps(name):
    data = torch.full((1, 2, 1, 4, 4), 0.7)
    for steps in (1, 2, 7):
        got = solve(make_scheduler(name), lambda x, t: (x - data) / t, steps, noise())
        torch.testing.assert_close(got, data, atol=1e-4, rtol=0)


def test_all_converge_and_higher_order_faster():
    expected = SPREAD * noise()
    errors = {name: float((solve(make_scheduler(name), gaussian_velocity, 40, noise()) - expected).abs().max())
              for name in FLOW_SCHEDULERS}
    assert errors["euler"] < 0.05
    assert all(errors[name] < errors["euler"] / 4 for name in FLOW_SCHEDULERS if name != "euler"), errors


@pytest.mark.parametrize("scheduler", [
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                algorithm_type="sde-dpmsolver++")])
def test_noise_of_a_stochastic_scheduler_depends_on_the_samples_seed(scheduler):
    both = solve(scheduler, gaussian_velocity, 4, noise(2), seeds=(3, 4))
    assert torch.equal(solve(scheduler, gaussian_velocity, 4, noise(2)[1:], seeds=(4,)), both[1:])
    assert not torch.equal(solve(scheduler, gaussian_velocity, 4, noise(2)[1:], seeds=(5,)), both[1:])


def test_schedulers_not_for_flows_are_refused():
    with pytest.raises(UserError, match="DDIMScheduler is not configured for flow matching"):
        check_scheduler(DDIMScheduler())
    with pytest.raises(UserError, match="choose from euler, heun, unipc, dpm"):
        make_scheduler("ddim")


def test_shift_grows_with_the_square_root_of_the_tokens():
    assert [resolution_shift(n) for n in (32, 256, 1024, 4096)] == [1, 1, 2, 4]
