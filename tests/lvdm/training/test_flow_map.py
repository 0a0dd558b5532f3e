"""Training a flow map: from a trained model, which it equals at first; with guidance learned in; then few steps."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from lvdm.capabilities import read_capabilities
from lvdm.condition import Condition
from lvdm.flow import guide, interpolate, velocity
from lvdm.model.groups import frame_positions
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.loading import load_lvdm_pipeline
from lvdm.training.dry_run import plan_training
from lvdm.training.flow_map import FlowMapMatching, FlowMapNoiseSampler
from lvdm.training.flow_matching import FlowConfig, FlowMatching
from lvdm.training.train import TrainConfig, train
from lvdm.training.windows import Windows
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

FLOW = FlowConfig(map={"guidance_rescale": 0.0})
SIZES = dict(hidden_size=24, num_layers=2, num_attention_heads=2, text_dim=8, sample_height=32, sample_width=32)


@pytest.fixture(scope="module")
def models():
    """A model with random weights, and the same as a flow map."""
    torch.manual_seed(0)
    plain = LVDMTransformer3DModel(**SIZES)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flow_map = LVDMTransformer3DModel(**SIZES, flow_map=True, guidance_embeds=True)
    new = flow_map.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in new} == {"interval_embed", "guidance_embed"}
    return plain.eval(), flow_map.eval()


def embed(captions):
    text = torch.stack([torch.full((2, 8), float(len(caption))) for caption in captions])
    return Condition(text, torch.ones(text.shape[:2], dtype=torch.bool))


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    windows = Windows(torch.randn(8, 4, 5, 4, 4), ("red",) * 8, tuple(range(8)), frame_positions(5, 2), 8.0, ("",) * 8)
    sampler = FlowMapNoiseSampler(FLOW, embed, guided=True, seed=0, group_size=2, patch_size=2)
    drawn = sampler(windows, 3)
    assert torch.equal(drawn.guidance, sampler(replace(windows, sample_indices=tuple(range(8))), 3).guidance)
    assert drawn.moving == tuple(i for i in range(8) if (drawn.r[i] < drawn.t[i]).any())
    return drawn


def test_at_first_it_is_the_model_that_it_starts_from(models, batch):
    plain, flow_map = models
    x = interpolate(batch.windows.latents, batch.noise, batch.t)
    expected = plain(x, batch.t, **batch.condition.arguments).sample
    given = flow_map(x, batch.t, **batch.condition.arguments, target_timestep=batch.r, guidance=batch.guidance).sample
    assert torch.equal(given, expected)
    without = replace(batch, r=batch.t, moving=(), guidance=None)  # r = t is flow matching
    assert torch.equal(FlowMapMatching(flow_map, FLOW).loss(without), FlowMatching(plain, FLOW).loss(batch))
    with pytest.raises(UserError, match="without flow_map: leave target_timestep out"):
        plain(x, batch.t, **batch.condition.arguments, target_timestep=batch.r)


def test_guidance_is_learned_in(models, batch):
    objective = FlowMapMatching(models[1], FLOW)
    x, v = interpolate(batch.windows.latents, batch.noise, batch.t), velocity(batch.windows.latents, batch.noise)

    def target(scale: float) -> torch.Tensor:
        guidance = torch.full((8,), scale)
        with torch.no_grad():
            return objective.target(replace(batch, moving=()), x, batch.t, batch.t, v, batch.condition, guidance)

    with torch.no_grad():
        cond, null = (models[1](x, batch.t, **condition.arguments).sample
                      for condition in (batch.condition, batch.null.select([0] * 8)))
    torch.testing.assert_close(target(1.0), v, atol=1e-5, rtol=1e-5)  # that of the condition alone
    torch.testing.assert_close(target(3.0), v + guide(null, cond, 3.0)[0] - cond, atol=1e-4, rtol=1e-4)


def test_both_derivatives_agree(models, batch):
    """On a function that is not smooth in t at small scales they differ: here the first sinusoids are left out."""
    torch.manual_seed(2)
    model = LVDMTransformer3DModel(**SIZES, flow_map=True, guidance_embeds=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for embedding in (model.time_embed, model.interval_embed):
        embedding.scale = 1.0
    rates = []
    for derivative in ("central", "jvp"):
        flow = FlowConfig(map={"derivative": derivative, "delta": 0.01})
        rates.append(FlowMapMatching(model.eval(), flow).loss(batch))
    torch.testing.assert_close(rates[0], rates[1], atol=1e-3, rtol=1e-3)


def test_a_stage_on_a_trained_model(cache, vae_folder, tmp_path, caplog):
    """Golden losses; the pipeline takes 4 steps by default, each one pass, and says what it does not take."""
    settings = [f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2", "loop.micro_batch_size=4",
                "loop.optimizer.name=muon", "loop.optimizer.learning_rate=2e-3", "loop.optimizer.warmup=2",
                "loop.log_every=4", "loop.evaluate_every=100", "sample.count=0"]
    sizes = ["model.hidden_size=24", "model.num_layers=2", "model.num_attention_heads=2"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = train(load_config(TrainConfig, None, [f"output={tmp_path}/plain", "loop.steps=2", *settings, *sizes]))
        with caplog.at_level(logging.INFO):
            folder = train(load_config(TrainConfig, None, [
                f"output={tmp_path}/map", f"model.init_from={first}", "flow.map={guidance: [1, 4]}", "loop.steps=12",
                *settings]))
    finally:
        torch.set_num_threads(threads)
    assert "new parameters for flow.map" in caplog.text and "interval_embed.linear_1.weight" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "map/metrics.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines if "error" in line] == pytest.approx(GOLDEN, rel=1e-3)

    able = read_capabilities(folder)
    assert (able.num_inference_steps, able.schedulers, able.passes(2.0)) == (4, ("euler",), 1)
    pipeline, rows = load_lvdm_pipeline(folder), []
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(
        (len(args[0]), kwargs.get("target_timestep"), kwargs["guidance"])), with_kwargs=True)
    pipeline("red", num_frames=9, guidance_scale=3.0, seed=0, output_type="latent")
    assert len(rows) == 4 + 1 + 4 and all(count == 1 and guidance == 3.0 for count, _, guidance in rows)
    assert [float(r[0, -1]) for _, r, _ in rows if r is not None] == pytest.approx([0.75, 0.5, 0.25, 0.0] * 2)
    with pytest.raises(UserError, match=r"negative_prompt: .* learned in"):
        pipeline("red", negative_prompt="blue")
    with pytest.raises(UserError, match=r"flow map, .* use the scheduler .euler."):
        pipeline("red", scheduler="unipc")


@pytest.mark.parametrize("options", [["condition=class"], ["condition=none", "flow.map={derivative: jvp}"]])
def test_classes_and_no_condition_from_scratch(options, cache, vae_folder, tmp_path):
    config = load_config(TrainConfig, None, [
        f"output={tmp_path}", f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2", "loop.steps=1",
        "loop.micro_batch_size=4", "loop.evaluate_every=1", "sample.count=1", "sample.steps=1", "model.hidden_size=24",
        "model.num_layers=1", "model.num_attention_heads=2", "flow.map={}", *options])
    assert plan_training(config).flops > 0
    model = LVDMTransformer3DModel.from_pretrained(train(config), subfolder="transformer")
    assert model.config.flow_map and model.config.guidance_embeds == (options[0] == "condition=class")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss_heldout"] > 0 and last["loss_heldout_t50"] > 0


GOLDEN = [0.976210, 0.954821, 0.906556]
