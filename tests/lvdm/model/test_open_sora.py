"""Open-Sora-Plan v1.2's transformer: the public code's outputs, and a config and weights that are accounted for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_dispatch import attention_backend
from safetensors.torch import load_file, save_file

from lvdm.convert.open_sora_plan import import_transformer
from odvae.utils.errors import UserError

CHECKPOINTS = Path(os.environ.get("ODVAE_REFERENCE", Path(__file__).parents[4] / "shared/reference-checkpoints"))
FOLDER = CHECKPOINTS / "opensora-t2v-v1.2-tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the reference checkpoint is not there")


@pytest.fixture(scope="module")
def model():
    return import_transformer(FOLDER)


@pytest.fixture(scope="module")
def io():
    return load_file(FOLDER / "io.safetensors")


@torch.no_grad()
def test_it_computes_what_the_public_code_computes(model, io):
    text, mask = io["encoder_hidden_states"][:, 0], io["encoder_attention_mask"][:, 0]
    sample = model(io["hidden_states"], io["timestep"], text, mask).sample
    torch.testing.assert_close(sample, io["sample"], atol=1e-4, rtol=0)
    image = model(io["image_hidden_states"], io["timestep"][:1], text[:1], mask[:1], return_dict=False)[0]
    torch.testing.assert_close(image, io["image_sample"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_guided_sampling_gives_the_public_codes_latents(model, io):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    text, mask = io["encoder_hidden_states"][:, 0].flip(0), io["encoder_attention_mask"][:, 0].flip(0)
    x = io["sampling_noise"] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        negative, positive = model(torch.cat([x, x]), t, text, mask).sample.chunk(2)
        x = scheduler.step(negative + 7.5 * (positive - negative), t, x).prev_sample
    torch.testing.assert_close(x, io["sampling_result"], atol=1e-3, rtol=1e-4)


def test_another_models_choice_of_a_kernel_is_not_its_own(io):
    """Diffusers keeps the last choice for the whole process; FlexAttention has no gradients on a CPU."""
    with attention_backend("flex"):
        text, mask = io["encoder_hidden_states"][:, 0], io["encoder_attention_mask"][:, 0]
        model = import_transformer(FOLDER).requires_grad_(True)
        sample = model(io["hidden_states"], io["timestep"], text, mask).sample
        sample.sum().backward()
    torch.testing.assert_close(sample.detach(), io["sample"], atol=1e-4, rtol=0)


def test_flex_attention_is_left_to_the_default_kernel(io, monkeypatch):
    """Nothing is masked that it could skip, and uncompiled it would write out all scores."""
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", None)
    model = import_transformer(FOLDER)
    model.set_attention_backend("flex")
    with torch.no_grad():
        sample = model(io["hidden_states"], io["timestep"], io["encoder_hidden_states"][:, 0],
                       io["encoder_attention_mask"][:, 0]).sample
    torch.testing.assert_close(sample, io["sample"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing_and_fused_projections_are_the_same(io):
    model = import_transformer(FOLDER)
    args = io["hidden_states"], io["timestep"]
    text, mask = io["encoder_hidden_states"][:, 0], io["encoder_attention_mask"][:, 0]
    expected = model(*args, text, mask).sample
    longer = torch.cat([text, torch.full_like(text, 9.0)], dim=1)
    padded = model(*args, longer, torch.cat([mask, torch.zeros_like(mask)], dim=1)).sample
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn1.fused_projections
    torch.testing.assert_close(model(*args, text, mask).sample, expected, atol=1e-5, rtol=0)


def test_gradients_with_and_without_checkpointing_are_the_same(io):
    model = import_transformer(FOLDER).train()
    args = io["hidden_states"], io["timestep"], io["encoder_hidden_states"][:, 0], io["encoder_attention_mask"][:, 0]
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(*args).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.enable_gradient_checkpointing()
    assert all(map(torch.equal, *gradients))


def test_shards_are_read_and_a_dtype_is_given(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shutil.copy(FOLDER / "config.json", tmp_path / "config.json")
    again = import_transformer(tmp_path, torch.bfloat16)
    assert again.dtype is torch.bfloat16
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("change", "message"), [
    ({"use_rope": False}, "use_rope: False"), ({"downsampler": "k333_s222"}, "downsampler"),
    ({"cross_attention_dim": 7}, "cross_attention_dim"), ({"tea": 1}, "unknown fields tea"),
    ({"_class_name": "DiT"}, "describes a DiT"), ({"num_layers": 3}, "lack 21 keys"),
    ({"num_layers": 1}, "unexpected key transformer_blocks.1"), ({"caption_channels": 8}, "has shape")])
def test_what_it_does_not_implement_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((FOLDER / "config.json").read_text()) | change))
    shutil.copy(FOLDER / WEIGHTS, tmp_path)
    with pytest.raises(UserError, match=message):
        import_transformer(tmp_path)


def test_missing_or_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        import_transformer(tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    with pytest.raises(UserError, match="safetensors only"):
        import_transformer(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"pickle")
    with pytest.raises(UserError, match="not a safetensors file"):
        import_transformer(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="unexpected key x"):
        import_transformer(tmp_path)
