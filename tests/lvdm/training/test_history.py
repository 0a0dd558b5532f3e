"""Teacher forcing: a group is predicted as a step of a rollout predicts it; a history of the model's own."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from lvdm.condition import Condition
from lvdm.flow import interpolate
from lvdm.model.groups import frame_positions
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.rollout import Rollout, RolloutStep
from lvdm.sampling.rollout_params import RolloutParams
from lvdm.training.batch import HistoryDraws
from lvdm.training.dry_run import plan_training
from lvdm.training.flow_map import FlowMapMatching, FlowMapNoiseSampler
from lvdm.training.flow_matching import FlowConfig, FlowMatching, FlowNoiseSampler
from lvdm.training.history import ForcedHistory
from lvdm.training.self_rollout import own_history
from lvdm.training.train import TrainConfig, train
from lvdm.training.windows import LatentWindows, Windows
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

SIZES = dict(in_channels=2, hidden_size=24, num_layers=2, num_attention_heads=2, sample_height=32, sample_width=32)
KINDS = {"text": {}, "class": {"text_dim": 0, "class_names": ["a", "b"]}, "none": {"text_dim": 0},
         "map": {"flow_map": True, "guidance_embeds": True}}
COUNT, FRAMES = 4, 7


def make_model(kind: str = "text") -> LVDMTransformer3DModel:
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(**SIZES | {"text_dim": 8} | KINDS[kind]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def condition_of(kind: str):
    def embed(captions):
        if kind == "none":
            return Condition()
        if kind == "class":
            return Condition(class_labels=torch.tensor([min(len(caption), 2) for caption in captions]))
        text = torch.stack([torch.full((2, 8), float(len(caption))) for caption in captions])
        return Condition(text, torch.ones(text.shape[:2], dtype=torch.bool))
    return embed


def windows(far: bool = False) -> Windows:
    torch.manual_seed(1)
    return Windows(torch.randn(COUNT, 2, FRAMES, 4, 4), ("red",) * COUNT, tuple(range(COUNT)),
                   frame_positions(FRAMES, 2, far), 8.0, ("",) * COUNT)


def sampler(flow: FlowConfig, kind: str = "text") -> FlowNoiseSampler:
    options = dict(seed=0, group_size=2, patch_size=2)
    if flow.map is not None:
        return FlowMapNoiseSampler(flow, condition_of(kind), guided=True, **options)
    return FlowNoiseSampler(flow, condition_of(kind), **options)


@pytest.mark.parametrize(("kind", "far"), [("text", False), ("text", True), ("class", False), ("none", True)])
def test_a_forced_group_is_predicted_as_by_a_cached_step_of_a_rollout(kind, far):
    """On the same history, of the first latent and three groups, at the same level and positions."""
    model, flow, given = make_model(kind), FlowConfig(regimes={"teacher": 1}, condition_dropout=0), windows(far)
    batch, level = sampler(flow, kind)(given, 3), 0.6
    batch = replace(batch, t=torch.full((COUNT, FRAMES), level))
    objective = FlowMatching(model, flow)
    x = interpolate(given.latents, batch.noise, batch.t)
    with torch.no_grad():
        history = objective.history(batch, batch.condition)
        history = replace(history, t=torch.full_like(history.t, 0.05))  # one for all, as in a rollout
        predicted = objective.predict(given, x, batch.t, batch.condition, history)
    for first, size in ((1, 2), (3, 2), (5, 2)):
        if far and first < 5:
            continue  # a rollout is not far before its window is full
        params = RolloutParams(sigmas=(level,), guidance_scale=1.0, history_noise=0.05, history_groups=2 if far else 3)
        rollout = Rollout(model, batch.condition, batch.condition, params, latents=size, height=4, width=4,
                          seeds=range(COUNT), initial=given.latents[:, :, :first])
        rollout.prefill()
        for group, begin in enumerate((0, 1, 3)[:len(rollout.initial)]):  # what the training noised
            stop = begin + rollout.initial[group].shape[2]
            rollout.past[group] = (history.latents[:, :, begin:stop], history.latents[:, :, begin:stop])
        rollout._start = lambda number, group, at=first, n=size: x[:, :, at:at + n]
        step = next(event for event in rollout.denoise_group(1, first) if isinstance(event, RolloutStep))
        v = (x[:, :, first:first + size] - step.estimate) / level
        torch.testing.assert_close(predicted[:, :, first:first + size], v, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["text", "map"])
def test_where_nothing_is_forced_it_is_diffusion_forcing(kind):
    model, given = make_model(kind), windows()
    flow = FlowConfig(map={"guidance_rescale": 0.0} if kind == "map" else None)
    batch = sampler(flow, kind)(given, 1)
    free = HistoryDraws(torch.zeros(COUNT, dtype=torch.bool), batch.noise, torch.zeros(COUNT, FRAMES))
    objective = (FlowMapMatching if kind == "map" else FlowMatching)(model, flow)
    torch.testing.assert_close(objective.errors(replace(batch, history=free)), objective.errors(batch), rtol=1e-4,
                               atol=1e-4)


def test_a_forced_flow_map_moves_every_group_and_sees_no_other_move():
    flow = FlowConfig(regimes={"teacher": 1}, map={"equal": 0.0, "guidance": None})
    batch, model = sampler(flow)(windows(), 1), make_model("map")
    assert (batch.r < batch.t)[batch.t > flow.history_noise].all() and batch.moving == tuple(range(COUNT))
    objective = FlowMapMatching(model, flow)
    x = interpolate(batch.windows.latents, batch.noise, batch.t)
    history = objective.history(batch, batch.condition)
    both = [objective.predict(batch.windows, x + change, batch.t, batch.condition, history, target_timestep=batch.r)
            for change in (0.0, torch.nn.functional.pad(torch.ones(1, 1, 5, 1, 1), (0, 0, 0, 0, 0, 2)))]
    assert torch.equal(both[0][:, :, 5:], both[1][:, :, 5:]) and not torch.equal(both[0], both[1])
    objective(batch, 1, 0)["loss"].backward()


def test_a_history_is_corrupted_frame_by_frame_and_not_predicted():
    """Levels of a prefix; drawn after all else, so that nothing else changes."""
    light, strong = (FlowConfig(regimes={"prefix": 1}, corruption=corruption)
                     for corruption in (None, {"share": 0.5, "noise": 0.3}))
    given = replace(windows(), latents=torch.zeros(300, 2, FRAMES, 4, 4), captions=("",) * 300,
                    sample_indices=tuple(range(300)))
    before, after = (sampler(flow)(given, 1) for flow in (light, strong))
    assert torch.equal(before.noise, after.noise) and before.noised is None
    assert torch.equal(after.t[after.noised], before.t[after.noised])
    history = (before.t == before.t[:, :1]) & (before.t <= 0.1)
    levels = after.t[history]
    assert not after.noised[history].any() and 0.25 < levels.max() <= 0.3
    assert (levels == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    quantile = sampler(strong).held_out(given, 0.5)
    assert quantile.noised is None and quantile.t.unique().numel() == 1


def test_an_own_history_is_that_of_a_model_that_knows_the_data():
    """A field that points at the data leads back to it, whatever the steps and the level; a wrong one does not."""
    given, model = windows(), make_model("none")
    noise, start = torch.randn_like(given.latents), torch.rand(COUNT)
    seen = torch.full((COUNT, FRAMES), 0.1)

    def made(model, steps):
        return own_history(model, given.latents, start, noise, noise, seen, steps, positions=given.positions)

    class Exact:
        config = model.config

        def __call__(self, x, t, *, positions, return_history=False, **layout):
            part = slice(positions[0], positions[0] + x.shape[2])  # velocity at x_t: (x_t - x_0) / t
            v = (x - given.latents[:, :, part]) / t[:, None, :, None, None]
            return type("Output", (), {"sample": v, "history": ()})

    for steps in (1, 3):
        torch.testing.assert_close(made(Exact(), steps), given.latents, atol=1e-5, rtol=1e-5)
    other = made(model, 2)
    assert torch.equal(other[:, :, 5:], given.latents[:, :, 5:]) and not other.requires_grad
    assert ((other - given.latents)[:, :, :5].abs().amax((1, 3, 4)) > 1e-3).all()


def test_an_own_history_is_drawn_after_the_warm_up_and_never_held_out():
    flow = FlowConfig(regimes={"teacher": 1, "group": 1}, self_rollout={"share": 0.5, "after": 5})
    draw, given, model = sampler(flow), windows(), make_model()
    early, late = draw(given, 4), draw(given, 5)
    assert early.history.own is None and draw.held_out(given).history.own is None
    own = late.history.own
    assert own.samples == (tuple(own.replaced.nonzero().flatten().tolist()) or (0,))
    assert not (own.replaced & ~late.history.forced).any()
    assert torch.equal(own.start, draw(given, 5).history.own.start)
    objective = FlowMatching(model, flow)
    history, true = (objective.history(batch, batch.condition) for batch in (
        late, replace(late, history=replace(late.history, own=None))))
    same = (history.latents == true.latents).flatten(1).all(1)
    assert torch.equal(same, ~own.replaced) and isinstance(history, ForcedHistory)
    objective(late, 5, 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("flow", "message"), [
    ("{self_rollout: {}}", "add it to regimes"),
    ("{regimes: {clip: 1, prefix: 0}, corruption: {}}", "add one to regimes"),
    ("{regimes: {teacher: 1}, self_rollout: {start: [0, 1]}}", "lowest, highest")])
def test_settings_without_effect_are_refused(flow, message):
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, None, [f"flow={flow}"])


def test_a_training_on_its_own_history_resumes_exactly(cache, vae_folder, tmp_path, monkeypatch):
    def config(name: str) -> TrainConfig:
        return load_config(TrainConfig, None, [
            f"output={tmp_path / name}", f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2",
            "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2", "sample.count=0",
            "loop.micro_batch_size=4", "loop.steps=4", "loop.save_every=2", "loop.log_every=1", "loop.evaluate_every=4",
            "flow={regimes: {teacher: 1, prefix: 1}, corruption: {}, self_rollout: {after: 1}}"])

    assert plan_training(config("planned")).flops > 0
    train(config("whole"))
    batch = LatentWindows.batch

    def stop_at_step_2(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentWindows, "batch", stop_at_step_2)
        train(config("cut"))
    train(config("cut"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and json.loads(logs[0].splitlines()[-1])["loss_heldout"] > 0
