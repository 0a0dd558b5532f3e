"""Rollout: neither the KV cache, nor the length, nor the batch changes the result; every group costs the same."""

from itertools import pairwise

import pytest
import torch

from lvdm.condition import Condition
from lvdm.defaults import FLOW_SCHEDULERS
from lvdm.flow import timesteps_schedule
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.rollout import RolloutGroup, RolloutStep, group_layout, rollout
from lvdm.sampling.schedulers import make_scheduler
from odvae.utils.errors import UserError
from odvae.utils.seeding import generator

DIM = 8


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(in_channels=2, hidden_size=24, num_layers=2, num_attention_heads=2, text_dim=DIM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def events(transformer, latents, seeds=(5,), words=(3,), **kwargs):
    """Sample b has a caption of `words[b]` tokens, which its seed decides, and padding."""
    text = torch.zeros(len(seeds), max(words), DIM)
    mask = torch.zeros(len(seeds), max(words), dtype=torch.bool)
    for b, (seed, n) in enumerate(zip(seeds, words, strict=True)):
        text[b, :n] = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))
        mask[b, :n] = True
    null = Condition(torch.ones(1, 1, DIM), torch.ones(1, 1, dtype=torch.bool))
    return rollout(transformer, Condition(text, mask), null, latents=latents, height=4, width=4, seeds=seeds,
                   **dict(num_inference_steps=3) | kwargs)


def video(*args, **kwargs):
    return torch.cat([e.latents for e in events(*args, **kwargs) if isinstance(e, RolloutGroup)], dim=2)


def assert_same(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("history_groups", [1, 2])
def test_cached_equals_uncached(transformer, guidance_scale, history_groups):
    settings = dict(latents=8, guidance_scale=guidance_scale, history_groups=history_groups)
    cached = video(transformer, **settings)
    assert cached.shape == (1, 2, 8, 4, 4) and cached.dtype == torch.float32
    assert_same(video(transformer, **settings, use_cache=False), cached)


def test_a_flow_map_is_evaluated_once_a_step_and_its_history_stays(transformer):
    flow_map = LVDMTransformer3DModel(**dict(transformer.config) | dict(flow_map=True, guidance_embeds=True)).eval()
    flow_map.load_state_dict(transformer.state_dict(), strict=False)
    assert_same(video(flow_map, 8, guidance_scale=3.0), video(transformer, 8, guidance_scale=1.0))  # not learned yet
    for embedding in (flow_map.interval_embed, flow_map.guidance_embed):
        torch.nn.init.normal_(embedding.linear_2.weight)
    cached = video(flow_map, 8, guidance_scale=3.0)
    assert_same(video(flow_map, 8, guidance_scale=3.0, use_cache=False), cached)
    assert not torch.allclose(video(flow_map, 8, guidance_scale=2.0), cached, atol=1e-2)
    assert events(flow_map, 8, guidance_scale=3.0).num_evaluations == 3 * 5


def test_a_short_video_is_the_beginning_of_a_longer_one(transformer):
    long = video(transformer, latents=9)
    for latents in (1, 4, 5):
        assert torch.equal(video(transformer, latents=latents), long[:, :, :latents])


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_batch_composition_does_not_matter(transformer, name):
    both = video(transformer, latents=5, seeds=(5, 7), words=(3, 4), scheduler=make_scheduler(name))
    assert_same(both[:1], video(transformer, latents=5, seeds=(5,), words=(3,), scheduler=make_scheduler(name)))
    assert_same(both[1:], video(transformer, latents=5, seeds=(7,), words=(4,), scheduler=make_scheduler(name)))
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("given", [1, 5, 7])
def test_continuation_equals_the_uninterrupted_rollout(transformer, given):
    whole = video(transformer, latents=11)
    later = video(transformer, latents=11 - given, initial=whole[:, :, :given])
    assert_same(later, whole[:, :, given:])


def test_continuation_depends_on_the_first_latent_and_the_window(transformer):
    initial = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))  # groups 1, 1, 2, 2, 2
    first = video(transformer, latents=3, initial=initial)
    assert first.shape[2] == 3
    changed = initial.clone()
    changed[:, :, 1:4] += 1
    assert torch.equal(video(transformer, latents=3, initial=changed), first)
    for latent in (0, 4):
        changed = initial.clone()
        changed[:, :, latent] += 1
        assert (video(transformer, latents=3, initial=changed) - first).abs().max() > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_default_scheduler_is_a_plain_euler_loop(transformer, shift):
    got = video(transformer, latents=1, num_inference_steps=4, guidance_scale=1.0, shift=shift)
    text = torch.randn(3, DIM, generator=torch.Generator().manual_seed(5))[None]
    x = torch.randn(2, 1, 4, 4, generator=generator(5, "noise", 0))[None]
    with torch.no_grad():
        for t, after in pairwise(timesteps_schedule(4, shift).tolist()):
            x = x + (after - t) * transformer(x, torch.full((1, 1), t), text).sample
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_a_group_follows_the_condition_of_its_first_latent(transformer):
    one, other = (Condition(torch.full((1, 1, DIM), value), torch.ones(1, 1, dtype=torch.bool)) for value in (-1., 1.))
    settings = dict(latents=7, height=4, width=4, seeds=[5], num_inference_steps=2)
    requested = []

    def changing(latent):
        requested.append(latent)
        return one if latent < 3 else other

    def joined(condition):
        events = rollout(transformer, condition, other, **settings)
        return torch.cat([e.latents for e in events if isinstance(e, RolloutGroup)], dim=2)

    changed, plain = joined(changing), joined(one)
    assert requested[1:] == [0, 1, 3, 5]
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert (changed[:, :, 3:] - plain[:, :, 3:]).abs().max() > 1e-3


def test_group_layout_of_context_and_generated_latents():
    assert group_layout(8, 0, 2) == (1, 2, 2, 2, 1)
    assert group_layout(8, 4, 2) == (1, 1, 2, 2, 2)
    assert group_layout(4, 4, 2) == (1, 1, 2) and group_layout(1, 1, 2) == (1,)


def test_history_noise_and_guidance_are_used(transformer):
    plain = video(transformer, latents=3)
    for change in (dict(history_noise=0.5), dict(guidance_scale=1.0), dict(shift=3.0), dict(seeds=(6,)),
                   dict(frame_rate=24.0)):
        other = video(transformer, latents=3, **change)
        assert (other[:, :, 1:] - plain[:, :, 1:]).abs().max() > 1e-3, change


def test_cost_and_positions_do_not_grow(transformer):
    calls = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["positions"]), with_kwargs=True)
    try:
        costs, positions, before = [], [], 0
        for event in events(transformer, latents=41, num_inference_steps=4):
            if isinstance(event, RolloutGroup):
                new, before = calls[before:], len(calls)
                costs.append(sum(map(len, new)))
                positions.append(max(map(max, new)))
    finally:
        hook.remove()
    assert len(costs) == 21 and costs[0] == 4  # one latent, four steps
    assert costs[3:] == [1 + 2 * 2 + 4 * 2] * 18  # the sink and the window once, then four steps of two latents
    assert positions == [0, 2, 4] + [8] * 18  # the positions of training windows


def test_events_report_progress(transformer):
    got = list(events(transformer, latents=4, num_inference_steps=2))
    steps = [(e.group, e.step) for e in got if isinstance(e, RolloutStep)]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert {e.groups for e in got} == {3} and {e.steps for e in got if isinstance(e, RolloutStep)} == {2}
    assert [e.latents.shape[2] for e in got if isinstance(e, RolloutGroup)] == [1, 2, 1]  # the last is cut


def test_gradient_mode_of_the_caller_is_left_alone(transformer):
    for event in events(transformer, latents=1, num_inference_steps=1):
        assert torch.is_grad_enabled()
        if isinstance(event, RolloutGroup):
            assert not event.latents.requires_grad


@pytest.mark.parametrize("kwargs, message", [
    (dict(latents=0), "at least 1"), (dict(latents=2, num_inference_steps=0), "at least 1"),
    (dict(latents=2, history_groups=0), "at least"),
    (dict(latents=2, history_noise=1.0), "history_noise"),
    (dict(latents=2, initial=torch.zeros(1, 3, 1, 4, 4)), r"\(1, 2, 'T', 4, 4\)"),
])
def test_invalid_arguments_are_refused_at_once(transformer, kwargs, message):
    with pytest.raises(UserError, match=message):
        events(transformer, **kwargs)


def test_a_history_that_follows_the_group_is_at_its_level(transformer):
    """At every step all tokens have the level of the group, down to `history_noise`; there is nothing to cache."""
    levels = []
    hook = transformer.register_forward_pre_hook(lambda module, args: levels.append(args[1]))
    try:
        video(transformer, latents=3, num_inference_steps=4, history_follow=1.0, history_noise=0.3, guidance_scale=1.0,
              shift=1.0)
    finally:
        hook.remove()
    assert [level.unique().tolist() for level in levels[:4]] == [[1.0], [0.75], [0.5], [0.25]]  # a first latent alone
    assert [level[0].tolist() for level in levels[4:]] == [
        [1.0] * 3, [0.75] * 3, [0.5] * 3, pytest.approx([0.3, 0.25, 0.25])]
    assert_same(video(transformer, 8, history_follow=0.05), video(transformer, 8))  # never above history_noise


@pytest.mark.parametrize("given", [5, 9])
def test_a_rolling_sink_is_renewed_by_the_group_that_leaves_the_window(transformer, given):
    """From group 5 on, when group 3 leaves; and a continuation, which has all latents, knows it."""
    whole, fixed = video(transformer, 17, sink_period=3), video(transformer, 17)
    assert torch.equal(whole[:, :, :11], fixed[:, :, :11])
    assert (whole - fixed)[:, :, 11:].abs().amax((1, 3, 4)).min() > 1e-4
    later = video(transformer, 17 - given, initial=whole[:, :, :given], sink_period=3)
    assert_same(later, whole[:, :, given:])
    changed = whole[:, :, :13].clone()
    changed[:, :, 0] += 1  # the first latent, which nobody sees any more
    assert torch.equal(video(transformer, 2, initial=changed, sink_period=3),
                       video(transformer, 2, initial=whole[:, :, :13], sink_period=3))
