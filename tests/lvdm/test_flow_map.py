"""Flow maps: exact for Gaussian data, whose average velocity has a closed form; one step equals many."""

from types import SimpleNamespace

import pytest
import torch

from lvdm.condition import Condition
from lvdm.flow import per_frame
from lvdm.flow_map import draw_interval
from lvdm.model.groups import frame_positions
from lvdm.sampling.outputs import RolloutGroup
from lvdm.sampling.rollout import rollout
from lvdm.training.flow_map import FlowMapBatch, FlowMapMatching
from lvdm.training.flow_matching import FlowConfig
from lvdm.training.windows import Windows
from odvae.utils.seeding import generator

STD = 0.6  # of the data; sigma(t) is that of x_t, and dx/dt = x sigma' / sigma


class GaussianMap(torch.nn.Module):
    """The flow map of normal numbers, x_r = x_t sigma(r) / sigma(t), with the interface of the transformer."""

    config = SimpleNamespace(in_channels=2, group_size=2, patch_size=1, flow_map=True, guidance_embeds=False)
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    @staticmethod
    def sigma(t):
        return ((1 - t) ** 2 * STD**2 + t**2).sqrt()

    def velocity(self, x, t):
        t = per_frame(t, x)
        return x * (t - (1 - t) * STD**2) / self.sigma(t) ** 2

    def forward(self, x, t, target_timestep=None, **_):
        r = t if target_timestep is None else target_timestep
        gap, ratio = per_frame(t - r, x), per_frame(self.sigma(r) / self.sigma(t), x)
        average = x * (1 - ratio) / torch.where(gap > 0, gap, 1.0)
        return SimpleNamespace(sample=torch.where(gap > 0, average, self.velocity(x, t)), history=None)


@pytest.mark.parametrize("derivative, tolerance", [("central", 2e-3), ("jvp", 1e-6)])
def test_the_target_is_the_average_velocity(derivative, tolerance):
    model = GaussianMap()
    objective = FlowMapMatching(model, FlowConfig(map={"derivative": derivative, "delta": 0.001}))
    x = torch.randn(4, 2, 3, 2, 2, generator=generator(0, "x"))
    t = torch.tensor([[0.5, 0.9, 0.9], [1.0, 0.6, 0.6], [0.05, 0.7, 0.7], [0.4, 0.4, 0.4]])
    r = torch.tensor([[0.0, 0.9, 0.9], [0.3, 0.6, 0.6], [0.05, 0.0, 0.0], [0.4, 0.4, 0.4]])
    windows = Windows(x, ("",) * 4, (0, 1, 2, 3), frame_positions(3, 2), 8.0, ("",) * 4)
    batch = FlowMapBatch(windows, x, t, Condition(), r, moving=(0, 1, 2))
    target = objective.target(batch, x, t, r, model.velocity(x, t), Condition(), None)
    torch.testing.assert_close(target, model(x, t, r).sample, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps_gives_the_same_video(steps):
    events = rollout(GaussianMap(), Condition(), Condition(), latents=5, height=2, width=2, seeds=[3],
                     num_inference_steps=steps, use_cache=False)
    video = torch.cat([event.latents for event in events if isinstance(event, RolloutGroup)], dim=2)
    noise = torch.cat([torch.randn(2, size, 2, 2, generator=generator(3, "noise", group))
                       for group, size in enumerate((1, 2, 2))], dim=1)
    torch.testing.assert_close(video[0], STD * noise)


def test_the_first_noised_group_moves_and_history_stays():
    t = torch.tensor([0.05, 0.7, 0.7, 0.4, 0.4])
    shares = dict(equal=0.5, zero=0.25, from_noise=0.25)
    draws = [draw_interval(generator(i, "interval"), t, t > 0.1, **shares) for i in range(2000)]
    rows = [(float(new[1]), float(r[1])) for new, r in draws]
    assert all(r[1] == r[2] and new[1] == new[2] for new, r in draws)
    for new, r in draws:
        assert torch.equal(new[[0, 3, 4]], t[[0, 3, 4]]) and torch.equal(r[[0, 3, 4]], t[[0, 3, 4]])
    moving = [(new, r) for new, r in rows if r < new]
    assert len(moving) / 2000 == pytest.approx(0.5, abs=0.04)
    assert sum(r == 0 for _, r in moving) / len(moving) == pytest.approx(0.5, abs=0.06)
    assert sum(new == 1 for new, _ in moving) / len(moving) == pytest.approx(0.25, abs=0.06)
    clip = torch.full((5,), 0.3)
    assert all((r < new).all() or torch.equal(r, clip)
               for new, r in (draw_interval(generator(i, "clip"), clip, clip > 0.1, **shares) for i in range(50)))
