"""Open-Sora-Plan v1.2 as a pipeline: imported, sampled as by the public code, decoded in groups."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import make_t5
from safetensors.torch import load_file

from lvdm.convert.open_sora_plan import find_folder, import_pipeline
from lvdm.sampling.open_sora import OpenSoraPipeline
from lvdm.sampling.outputs import DecodeProgress, RolloutGroup, RolloutStep, VideoChunk
from odvae import AutoencoderKLODVAE
from odvae.inference.memory import MemoryOptions
from odvae.inference.streaming import decode_groups
from odvae.utils.errors import UserError

CHECKPOINTS = Path(os.environ.get("ODVAE_REFERENCE", Path(__file__).parents[4] / "shared/reference-checkpoints"))
FOLDER = CHECKPOINTS / "opensora-t2v-v1.2-tiny"
CALL = dict(num_inference_steps=2, num_frames=61, seed=0)  # 16 latent frames: groups of 8, 7 and 1
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the reference checkpoint is not there")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline, imported from folders as the public ones are."""
    root = tmp_path_factory.mktemp("open-sora")
    encoder = make_t5(dim=32)
    encoder.model.save_pretrained(root / "t5")
    encoder.tokenizer.save_pretrained(root / "t5")
    import_pipeline(str(FOLDER), root / "pipeline", vae=str(CHECKPOINTS / "causalvae-v1.2-tiny"),
                    text_encoder=str(root / "t5"))
    return root / "pipeline"


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = OpenSoraPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sampling_is_that_of_the_public_code(pipeline):
    io = load_file(FOLDER / "io.safetensors")
    text, mask = io["encoder_hidden_states"][:, 0], io["encoder_attention_mask"][:, 0]
    result = pipeline(
        prompt_embeds=text[:1], prompt_embeds_mask=mask[:1], negative_prompt_embeds=text[1:],
        negative_prompt_embeds_mask=mask[1:], latents=io["sampling_noise"], num_inference_steps=4, num_frames=9,
        scheduler=DDIMScheduler(clip_sample=False), output_type="latent")
    torch.testing.assert_close(result.latents, io["sampling_result"], atol=1e-3, rtol=1e-4)


def test_events_steps_latents_then_groups_of_the_papers_tiling(pipeline):
    events = list(pipeline.stream("red", **CALL))
    kinds = [RolloutStep] * 2 + [RolloutGroup] + [DecodeProgress, VideoChunk] * 3
    assert [type(event) for event in events] == kinds
    chunks = [event for event in events if isinstance(event, VideoChunk)]
    assert [(c.group, c.groups, c.frames.shape[1]) for c in chunks] == [(1, 3, 29), (2, 3, 28), (3, 3, 4)]
    latents = events[2].latents
    assert torch.equal(torch.cat([c.latents for c in chunks], 2), latents)
    frames = np.concatenate([c.frames for c in chunks], 1)
    whole = decode_groups(pipeline.vae, pipeline.vae.denormalize(latents), group=29)
    assert np.abs((whole.clamp(-1, 1) + 1).permute(0, 2, 3, 4, 1).numpy() * 127.5 - frames).max() <= 0.51
    assert np.array_equal(pipeline("red", **CALL, output_type="uint8").frames, frames)
    again = pipeline.decode_latents(latents.split(pipeline.group_layout(16), dim=2))
    assert np.array_equal(np.concatenate(list(again), 1), frames)


def test_a_causal_vae_is_streamed_exactly(pipeline):
    torch.manual_seed(0)
    vae = AutoencoderKLODVAE(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    causal = OpenSoraPipeline(vae.eval(), pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer)
    causal.set_progress_bar_config(disable=True)
    result = causal("red", **CALL, output_type="uint8")
    with torch.no_grad():
        whole = vae.decode(vae.denormalize(result.latents)).sample
    assert np.abs((whole.clamp(-1, 1) + 1).permute(0, 2, 3, 4, 1).numpy() * 127.5 - result.frames).max() <= 0.51


@pytest.mark.parametrize("name", ["euler-ancestral", "euler", "ddim", "ddpm", "unipc", "dpm"])
def test_schedulers_and_batches_depend_on_the_samples_seed_alone(pipeline, name):
    call = dict(num_inference_steps=3, num_frames=5, scheduler=name, output_type="latent", return_dict=False)
    both = pipeline(["blue", "RED "], **call, seed=[7, 3])[0]
    torch.testing.assert_close(pipeline("red", **call, seed=3)[0], both[1:], atol=1e-3, rtol=1e-3)
    assert both.isfinite().all()


def test_a_plan_bounds_the_memory_of_a_vae_that_is_not_causal(pipeline):
    whole = pipeline.requirements(256, 256).decoding
    plan = pipeline.decode_plan(MemoryOptions(free=int(whole / 0.8) - 1), 256, 256)
    assert plan.tiling is not None and plan.frames == 28  # smaller tiles, groups as they are
    assert pipeline.decode_plan(MemoryOptions(free=2 * whole), 256, 256).tiling is None
    with pytest.raises(UserError, match="must be free"):
        pipeline.stream("red", height=256, width=256, memory=MemoryOptions(free=2**20))


@pytest.mark.parametrize(("change", "message"), [
    (dict(prompt=[(0, "red"), (1, "blue")]), "sections: this model denoises the whole video at once"),
    (dict(height=40), "multiples of 16; the nearest is 32x80"), (dict(num_frames=6), "nearest are 5 and 9"),
    (dict(num_inference_steps=0), "at least 1"), (dict(scheduler="heun"), "unknown scheduler 'heun'"),
    (dict(scheduler=FlowMatchEulerDiscreteScheduler()), 'predicts "epsilon"'),
    (dict(latents=torch.zeros(1, 4, 1, 8, 10)), r"latents must be \(B, c, T, h, w\)")])
def test_what_it_cannot_do_is_refused_at_once(pipeline, change, message):
    with pytest.raises(UserError, match=message):
        pipeline.stream(**dict(prompt="red") | CALL | change)


def test_components_that_do_not_match_and_names_that_are_nowhere_are_refused(pipeline, tmp_path):
    encoder = make_t5(dim=16)
    with pytest.raises(UserError, match=r"text encoder's states have 16 channels, .* 32"):
        OpenSoraPipeline(pipeline.vae, pipeline.transformer, encoder.model, encoder.tokenizer)
    with pytest.raises(UserError, match="is no folder; give one, or a hub name"):
        find_folder(str(tmp_path / "none"))
    with pytest.raises(UserError, match="neither a folder nor can it be downloaded"):
        find_folder("owner/repository/93x480p")
