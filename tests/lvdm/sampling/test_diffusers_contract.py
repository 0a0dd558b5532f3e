"""What diffusers' own pipeline tests hold a pipeline to, of both pipelines."""

import json
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from huggingface_hub import ModelCard
from pipelines import make_pipeline, make_t5

from lvdm.model.open_sora import OpenSoraT2VTransformer3DModel
from lvdm.sampling import model_card
from lvdm.sampling.inputs import CALLBACK_TENSORS
from lvdm.sampling.open_sora import OpenSoraPipeline
from odvae.utils.errors import UserError

CALL = dict(prompt="red", negative_prompt="blue", num_frames=5, num_inference_steps=2, height=16, width=16,
            guidance_scale=3.0, seed=0)
CPU = torch.device("cpu")


def make(kind):
    if kind == "lvdm":
        pipeline = make_pipeline(make_t5())
    else:
        parts = dict(make_pipeline(make_t5()).components)
        parts["transformer"] = OpenSoraT2VTransformer3DModel(num_attention_heads=2, attention_head_dim=12,
                                                             in_channels=2, num_layers=2, caption_channels=16).eval()
        parts["transformer"].caption_projection.linear_2.weight.data.mul_(300)  # the text must matter
        del parts["scheduler"]
        pipeline = OpenSoraPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["lvdm", "open_sora"])
def pipeline(request):
    return make(request.param)


def latents(pipeline, **call):
    return pipeline(**CALL | call, output_type="latent", return_dict=False)[0]


def run_with(pipeline, change, names=CALLBACK_TENSORS):
    def callback(pipe, step, timestep, tensors):
        assert tuple(tensors) == tuple(names)
        return change(step, tensors)

    return latents(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


def test_embeddings_that_a_callback_returns_take_effect(pipeline):
    assert pipeline._callback_tensor_inputs == list(CALLBACK_TENSORS)
    plain = latents(pipeline)
    assert torch.equal(run_with(pipeline, lambda step, tensors: tensors), plain)
    swapped = latents(pipeline, prompt="blue", negative_prompt="red")

    def swap(step, tensors):
        return {name: tensors[name.removeprefix("negative_") if "negative" in name else f"negative_{name}"]
                for name in tensors if name != "latents"} if step == 0 else {}

    changed = run_with(pipeline, swap)
    assert (changed - plain).abs().max() > 1e-3 and (changed - swapped).abs().max() > 1e-3
    longer = run_with(pipeline, lambda step, tensors: {
        name: torch.cat([tensors[name]] * 2, dim=1) for name in ("prompt_embeds", "prompt_embeds_mask")})
    assert longer.shape == plain.shape
    with pytest.raises(UserError, match=r"must be \(B, M, D\) = \(1, M, 16"):
        run_with(pipeline, lambda step, tensors: {"prompt_embeds": tensors["prompt_embeds"][..., :4]})
    with pytest.raises(UserError, match="no negative_prompt_embeds to replace"):
        latents(pipeline, guidance_scale=1.0, callback_on_step_end=lambda *_: {"negative_prompt_embeds": plain})


def test_prompts_are_encoded_and_sampled_by_two_pipelines(pipeline):
    """So that a large text encoder and the transformer are never in memory together."""
    expected, parts, kind = latents(pipeline), pipeline.components, type(pipeline)
    text = kind(**parts | dict(vae=None, transformer=None))
    names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
    embeds = dict(zip(names, text.encode_prompt("red", "blue"), strict=True))
    assert text.encode_prompt(None, **embeds)[0] is embeds["prompt_embeds"]
    assert text.encode_prompt("red", dtype=torch.float16, device="cpu")[0].dtype == torch.float16
    with pytest.raises(UserError, match="loaded without its vae, so it can only encode"):
        text(**CALL)
    network = kind(**parts | dict(text_encoder=None, tokenizer=None))
    network.set_progress_bar_config(disable=True)
    given = CALL | dict(prompt=None, negative_prompt=None)
    assert torch.equal(latents(network, **given | embeds), expected)
    with pytest.raises(UserError, match="no text_encoder; give it prompt_embeds and negative_prompt_embeds"):
        network.check_inputs(**CALL)
    network.check_inputs(**given | embeds)
    latents(network, **given | dict(prompt_embeds=embeds["prompt_embeds"], guidance_scale=1.0))


def test_float_frames_are_not_rounded(pipeline):
    floats, rounded = (pipeline(**CALL, output_type=kind).frames for kind in ("np", "uint8"))
    assert floats.dtype == np.float32 and floats.min() >= 0 and floats.max() <= 1
    assert np.abs(floats * 255 - rounded).max() <= 0.51 and np.abs(floats * 255 - np.rint(floats * 255)).max() > 0.1
    assert pipeline.vae_scale_factor_spatial == 8 and pipeline.vae_scale_factor_temporal == 4
    pixels = pipeline.video_processor.preprocess_video(floats[0])
    assert pixels.shape == (1, 3, 5, 16, 16)


OFFLOADS = {
    "sequential": lambda pipeline, folder: pipeline.enable_sequential_cpu_offload(device="cpu"),
    "leaves": lambda pipeline, folder: pipeline.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "leaves on disk": lambda pipeline, folder: pipeline.enable_group_offload(
        CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder), exclude_modules="text_encoder"),
    "blocks": lambda pipeline, folder: pipeline.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1, exclude_modules=["vae"]),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_is_exact(pipeline, offload, tmp_path, monkeypatch):
    cpu_offload = accelerate.cpu_offload  # to accelerate, the device "cpu:0" that diffusers names is another than "cpu"
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options))
    expected = pipeline(**CALL).frames
    OFFLOADS[offload](pipeline, tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(pipeline(**CALL).frames, expected, atol=1e-4)
    if offload == "sequential":
        assert {pipeline.vae.device.type, pipeline.transformer.device.type} == {"meta"}


def test_shared_weights_are_not_offloaded_to_a_disk(tmp_path):
    with pytest.raises(UserError, match="text_encoder: layers share a weight"):
        make("lvdm").enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))


def test_precision_by_component_and_device_map(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    kind = type(pipeline)
    loaded = kind.from_pretrained(tmp_path, torch_dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float16)
    mapped = kind.from_pretrained(tmp_path, device_map="cpu")
    mapped.set_progress_bar_config(disable=True)
    assert torch.equal(latents(mapped), latents(pipeline))


def test_a_model_card_is_saved_and_uploaded(pipeline, tmp_path, monkeypatch):
    uploaded = {}

    def upload_folder(*, folder_path, repo_id, **options):
        for file in Path(folder_path).glob("*.*"):
            uploaded[file.name] = file.read_text("utf-8")

    repository = type("Url", (), {"repo_id": "me/mine"})
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *args, **options: repository)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    generated = f"---\n---\n{model_card.GENERATED}."
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load",
                        lambda *args, **options: ModelCard(generated))
    name = type(pipeline).__name__
    pipeline.push_to_hub("mine")
    card = uploaded["README.md"]
    assert f"# {name}" in card and 'from_pretrained("me/mine", trust_remote_code=True)' in card
    assert "pipeline_tag: text-to-video" in card and "| `vae` | AutoencoderKLODVAE |" in card
    assert json.loads(uploaded["model_index.json"])["_class_name"] == ["pipeline", name]
    generated = "---\n---\nWritten by a person."
    pipeline.push_to_hub("mine")
    assert "Written by a person." in uploaded["README.md"]
    pipeline.save_pretrained(tmp_path / "saved")
    assert f"# {name}" in (tmp_path / "saved/README.md").read_text("utf-8")
    (tmp_path / "saved/README.md").write_text("mine")
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "mine"


def test_a_cache_skips_blocks_of_open_sora():
    pipeline = make("open_sora")
    plain = latents(pipeline, num_inference_steps=4)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
    for _ in range(2):  # its state does not outlive a call
        cached = latents(pipeline, num_inference_steps=4)
        assert (cached - plain).abs().max() > 1e-4
    pipeline.transformer.disable_cache()
    assert torch.equal(latents(pipeline, num_inference_steps=4), plain)
