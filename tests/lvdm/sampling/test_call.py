"""The call of the pipelines is diffusers': its arguments, outputs, callbacks and attributes."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif
from PIL import Image
from pipelines import make_pipeline

from lvdm.sampling.inputs import to_frames
from lvdm.sampling.open_sora import OpenSoraPipeline
from lvdm.sampling.pipeline import LVDMPipeline
from odvae.data import probe
from odvae.utils.errors import UserError

CALL = dict(num_frames=9, num_inference_steps=2, height=16, width=16, output_type="latent", return_dict=False)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [LVDMPipeline, OpenSoraPipeline])
def test_stream_and_call_take_the_same_arguments_with_the_same_defaults(kind):
    call = {name: parameter.default for name, parameter in inspect.signature(kind.__call__).parameters.items()}
    assert {call.pop("self"), call.pop("output_type"), call.pop("return_dict")} == {inspect.Parameter.empty, "np", True}
    assert call == {field.name: field.default for field in fields(kind.inputs_type)}
    expected = ("prompt negative_prompt height width num_frames num_inference_steps sigmas guidance_scale "
                "num_videos_per_prompt generator latents prompt_embeds prompt_embeds_mask negative_prompt_embeds "
                "negative_prompt_embeds_mask callback_on_step_end callback_on_step_end_tensor_inputs attention_kwargs "
                "max_sequence_length")
    assert set(expected.split()) <= call.keys()


def test_output_types_show_the_same_frames(pipeline, tmp_path):
    outputs = {kind: pipeline("red", **CALL | dict(output_type=kind), seed=1)[0]
               for kind in ("uint8", "np", "pt", "pil", "latent")}
    frames = outputs["uint8"]
    assert frames.dtype == np.uint8 and frames.shape == (1, 9, 16, 16, 3)
    assert outputs["np"].dtype == np.float32 and np.array_equal(np.rint(outputs["np"] * 255), frames)
    assert np.array_equal(outputs["pt"].permute(0, 1, 3, 4, 2).numpy(), outputs["np"])
    assert np.array_equal(np.stack([np.asarray(image) for image in outputs["pil"][0]]), frames[0])
    assert torch.equal(pipeline("red", **CALL | dict(return_dict=True), seed=1).latents, outputs["latent"])
    assert outputs["np"].min() >= 0 and outputs["np"].max() <= 1  # as diffusers' export_to_video takes them
    export_to_gif(outputs["pil"][0], str(tmp_path / "a.gif"), fps=8)
    assert probe(tmp_path / "a.gif").frames == 9
    with pytest.raises(UserError, match="choose from pil, np"):
        pipeline("red", output_type="gif")


def test_generators_draw_the_seeds(pipeline):
    one = pipeline("red", **CALL, generator=seeded(0))[0]
    assert torch.equal(one, pipeline("red", **CALL, generator=seeded(0))[0])
    both = pipeline(["blue", "red"], **CALL, generator=[seeded(1), seeded(0)])[0]
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-4)
    torch.manual_seed(5)
    drawn = pipeline("red", **CALL)[0]
    assert not torch.equal(drawn, pipeline("red", **CALL)[0])
    torch.manual_seed(5)
    assert torch.equal(drawn, pipeline("red", **CALL)[0])
    for wrong in (dict(generator=[seeded(0)] * 2), dict(generator=seeded(0), seed=1)):
        with pytest.raises(UserError, match="generator"):
            pipeline("red", **CALL, **wrong)


def test_several_videos_of_a_prompt_differ_and_lie_side_by_side(pipeline):
    videos = pipeline(["red", "blue"], **CALL, num_videos_per_prompt=2, seed=[1, 2, 3, 4])[0]
    blue = pipeline("blue", **CALL, seed=[3])[0]
    torch.testing.assert_close(videos[2:3], blue, atol=1e-4, rtol=1e-4)
    assert (videos[2] - videos[3]).abs().max() > 1e-3
    assert len(pipeline("red", **CALL, num_videos_per_prompt=3, seed=0)[0]) == 3


def test_embeddings_stand_for_their_prompts(pipeline):
    embeds, mask, negative, negative_mask = pipeline.encode_prompt("red circle", "dark")
    given = dict(prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
                 negative_prompt_embeds_mask=negative_mask)
    expected = pipeline("red circle", negative_prompt="dark", **CALL, seed=0)[0]
    assert torch.equal(pipeline(**given, **CALL, seed=0)[0], expected)
    cut = pipeline("red circle", negative_prompt="dark", **CALL, seed=0, max_sequence_length=2)[0]
    assert torch.equal(cut, pipeline("red", negative_prompt="dark", **CALL, seed=0)[0])  # the begin token and a word
    assert len(pipeline.encode_prompt(["a", "b"], None, False, num_videos_per_prompt=2)[0]) == 4
    for wrong in (dict(prompt="red", **given), dict(), dict(given, prompt_embeds_mask=mask[:, 1:])):
        with pytest.raises(UserError, match="prompt_embeds"):
            pipeline(**wrong, **CALL)


def test_noise_and_noise_levels_may_be_given(pipeline):
    noise = torch.randn(1, pipeline.vae.latent_channels, 3, 2, 2, generator=seeded(2))
    a, b = (pipeline("red", **CALL, latents=noise, seed=seed, history_noise=0.0)[0] for seed in (0, 1))
    assert torch.equal(a, b)
    default = pipeline("red", **CALL | dict(num_inference_steps=4), shift=1.0, seed=0)[0]
    sigmas = [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(pipeline("red", **CALL, sigmas=sigmas, seed=0)[0], default)
    for wrong in ([0.5, 0.75], [1.0, 0.0], []):
        with pytest.raises(UserError, match="sigmas must descend"):
            pipeline("red", **CALL, sigmas=wrong)
    with pytest.raises(UserError, match="the noise to start from, must be"):
        pipeline("red", **CALL, latents=noise[:, :, :2])


def test_a_callback_sees_and_changes_every_step(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep)), tuple(tensors)))
        assert pipe is pipeline and pipe.guidance_scale == 2.0 and pipe.do_classifier_free_guidance
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    result = pipeline("red", **CALL, shift=1.0, seed=0, callback_on_step_end=callback)[0]
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and pipeline.num_timesteps == 4  # two groups
    assert seen[0] == (0, 1000, ("latents",)) and seen[1][1] == 500
    assert result[:, :, 1:].abs().sum() == 0 and result[:, :, :1].abs().sum() > 0
    with pytest.raises(UserError, match="there is no noise; choose from latents, prompt"):
        pipeline("red", **CALL, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


def test_a_callback_may_change_the_guidance_or_interrupt(pipeline):
    def cut_off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    plain, cut = (pipeline("red", **CALL, seed=0, guidance_rescale=0.0, callback_on_step_end=f)[0]
                  for f in (None, cut_off))
    assert not torch.equal(plain, cut)
    assert pipeline("red", **CALL, seed=0, callback_on_step_end=stop)[0].shape[2] == 1 and pipeline.interrupt


@pytest.mark.parametrize("form", ["pil", "array", "float", "tensor", "list"])
def test_images_and_videos_come_in_diffusers_forms(pipeline, form):
    video = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    forms = {"pil": [Image.fromarray(frame) for frame in video], "array": video, "float": video / 255,
             "tensor": torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255, "list": list(video)}
    assert np.array_equal(to_frames(forms[form]), video)
    image = forms[form][0]
    expected = pipeline("red", image=video[0], **CALL, seed=0)[0]
    assert torch.equal(pipeline("red", image=image, **CALL, seed=0)[0], expected)
    assert pipeline("red", image=Image.new("RGB", (50, 40)), **CALL, seed=0)[0].shape[3:] == (2, 2)  # scaled, cropped


def test_a_progress_bar_counts_the_steps(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False, desc="sampling")
    pipeline("red", **CALL)
    pipeline.set_progress_bar_config(disable=True)
    out = capsys.readouterr().err
    assert "sampling" in out and "4/4" in out


def test_a_folder_loads_without_its_class_being_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is LVDMPipeline
    assert torch.equal(loaded("red", **CALL, seed=0)[0], pipeline("red", **CALL, seed=0)[0])
    (tmp_path / "saved/pipeline.py").write_text("raise SystemExit")  # not read where the class is named
    assert type(LVDMPipeline.from_pretrained(tmp_path / "saved")) is LVDMPipeline
    other = LVDMPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer


def test_variants_and_shards_are_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp32", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.fp32-*.safetensors"))) > 1
    loaded = LVDMPipeline.from_pretrained(tmp_path, variant="fp32")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("red", **CALL, seed=0)[0], pipeline("red", **CALL, seed=0)[0])
