"""Numbers that are none are told by the part that gave them and leave no video; what decides the pixels is compared."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from pipelines import make_pipeline, make_t5
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lvdm.cli import main
from lvdm.flow import guide, rescale_guidance
from lvdm.generation.generate import generate
from lvdm.generation.latent_store import fingerprints
from lvdm.generation.requests import build_requests
from lvdm.sampling.params import VideoFileParams
from lvdm.text import WordHashEncoder
from odvae import AutoencoderKLODVAE
from odvae.data.video.reader import read_clip
from odvae.utils import precision
from odvae.utils.errors import NonFiniteError, UserError

SIZE = dict(frames=9, steps=2, height=16, width=16)  # groups of 1 and 2 latents
NAN, INF = float("nan"), float("inf")


def asked(out, prompts=("red",), **changes):
    return build_requests(
        out, [VideoFileParams(prompt=p, seed=3 + i, **SIZE | changes) for i, p in enumerate(prompts)]
    )


def spoil(module, value):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("part", "told"), [
    ("transformer.project_out", r"the transformer gave NaN or infinity .*project_out\.weight is not finite"),
    ("vae.decoder.conv_out", r"the VAE's decoder gave NaN or infinity .*decoder\.conv_out\.weight is not finite"),
    ("text_encoder.encoder.block", "the text encoder gave NaN or infinity")])
def test_the_part_is_named_and_nothing_is_left(part, told, value, tmp_path):
    pipeline = make_pipeline(make_t5())
    where = pipeline
    for name in part.split("."):
        where = getattr(where, name)
    spoil(where, value)
    with pytest.raises(NonFiniteError, match=told):
        pipeline("red", **SIZE)
    with pytest.raises(NonFiniteError, match=told):
        generate(pipeline, asked(tmp_path, ["red", "blue"]))
    assert not list(tmp_path.iterdir())


def test_the_encoder_is_named_too():
    pipeline = make_pipeline()
    spoil(pipeline.vae.encoder.conv_in, NAN)
    with pytest.raises(NonFiniteError, match="the VAE's encoder"):
        pipeline("red", image=np.zeros((16, 16, 3), np.uint8), **SIZE)


def test_a_transformer_that_fails_later_leaves_no_group_to_go_on_from(tmp_path, monkeypatch):
    """Of two videos only one fails, in its second group."""
    pipeline = make_pipeline()
    forward = pipeline.transformer.forward

    def sometimes(latents, timestep, text, *args, **kwargs):
        made = forward(latents, timestep, text, *args, **kwargs)
        if not kwargs.get("return_history") and latents.shape[2] == 2:
            made.sample[(text[:, 1, 0] - blue).abs() < 1e-6] = NAN
        return made

    blue = pipeline.text_encoder.encode(["blue"])[0][0, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.transformer, "forward", sometimes)
        done = generate(pipeline, asked(tmp_path, ["red", "blue"]))
    assert [p.name for p in done.made] == ["00-red.mp4"] and done.non_finite == [tmp_path / "01-blue.mp4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00-red.mp4", "00-red.safetensors"]
    again = generate(pipeline, asked(tmp_path, ["red", "blue"]))
    assert [p.name for p in again.reused] == ["00-red.mp4"] and [p.name for p in again.made] == ["01-blue.mp4"]


@pytest.mark.parametrize("change", [
    *({name: value} for name in ("guidance_scale", "guidance_rescale", "shift", "frame_rate", "history_noise")
      for value in (NAN, INF, -INF)),
    {"prompt": [(0, "red"), (NAN, "blue")]}, {"prompt": [(0, "red"), (INF, "blue")]},
    {"initial": torch.full((1, 2, 1, 2, 2), NAN)}], ids=str)
def test_a_parameter_that_is_no_number_is_refused_at_once(change):
    with pytest.raises(UserError, match=next(iter(change)).partition("_")[0]):
        make_pipeline().stream(**{"prompt": "red"} | SIZE | change)


@pytest.mark.parametrize("change", [{"batch": 0}, {"height": 0}], ids=str)
def test_nothing_is_no_size(change):
    with pytest.raises(UserError):
        make_pipeline().requirements(**change)
    with pytest.raises(UserError, match="batch=0"):
        generate(make_pipeline(), [], batch=0)


def test_the_commands_tell_it_by_their_status(tmp_path, capsys):
    pipeline, folder, out = make_pipeline(), tmp_path / "pipeline", tmp_path / "out"
    pipeline.save_pretrained(folder)
    command = ["generate", "red", "--pipeline", str(folder), "--out", str(out), "--frames", "5", "--steps", "1"]
    for option in ("--guidance-scale", "--guidance-rescale", "--shift", "--frame-rate", "--history-noise"):
        for value in ("nan", "inf", "-inf"):
            assert main([*command, f"{option}={value}"]) == 2
            assert option[2:].replace("-", "_") in capsys.readouterr().err
    assert main(["evaluate", "--pipeline", str(folder), "--out", str(out), "--guidance-scale", "nan"]) == 2
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file(whole | {"decoder.conv_in.bias": whole["decoder.conv_in.bias"] * NAN}, weights, {"format": "pt"})
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "error: the VAE's decoder gave NaN" in told and "decoder.conv_in.bias" in told and "Traceback" not in told
    assert not list(out.glob("*"))
    save_file(whole, weights, {"format": "pt"})
    assert main(command) == 0 and "1 made, 0 reused" in capsys.readouterr().out


def test_kept_latents_that_are_no_numbers_are_not_reused(tmp_path):
    """As a version that did not look may have left them."""
    pipeline, (job,) = make_pipeline(), asked(tmp_path)
    generate(pipeline, [job])
    with safe_open(job.latents, "pt") as file:
        metadata = file.metadata()
    save_file({"latents": load_file(job.latents)["latents"] * NAN}, job.latents, metadata)
    with pytest.raises(UserError, match=r"holds NaN or infinity; make the video again with --overwrite"):
        generate(pipeline, [job])
    assert generate(pipeline, [job], overwrite=True).made


# ---- what decides the pixels ----


def test_adapters_count_with_their_weight_and_state(tmp_path):
    pipeline = make_pipeline()
    transformer, (job,) = pipeline.transformer, asked(tmp_path)
    plain = fingerprints(pipeline)
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False), "a")
    generate(pipeline, [job])
    shown, seen = read_clip(job.target), [plain, fingerprints(pipeline)]

    def changed(name):
        assert generate(pipeline, asked(tmp_path / name)).made
        assert not np.array_equal(read_clip(tmp_path / name / "00-red.mp4"), shown), "it changes the pixels"
        with pytest.raises(UserError, match=r"made otherwise .another transformer"):
            generate(pipeline, [job])
        seen.append(fingerprints(pipeline))

    transformer.set_adapters(["a"], [0.1])
    changed("weak")
    transformer.set_adapters(["a"], [1.0])
    assert generate(pipeline, [job]).reused == [job.target]
    transformer.disable_lora()
    changed("off")
    transformer.enable_lora()
    assert generate(pipeline, [job]).reused == [job.target]
    transformer.fuse_lora(lora_scale=3.0)
    changed("fused")
    assert len({one["transformer"] for one in seen}) == len(seen)
    transformer.unfuse_lora()
    transformer.delete_adapters("a")
    changed("none")


def test_what_else_changes_the_pixels_counts(tmp_path):
    pipeline = make_pipeline(make_t5())
    (job,) = asked(tmp_path)
    generate(pipeline, [job])
    same, told = fingerprints(pipeline), r"made otherwise .another "
    pipeline.vae.enable_tiling(8, 8)
    with pytest.raises(UserError, match=told + "tiling"):
        generate(pipeline, [job])
    pipeline.vae.disable_tiling()
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                     solver_order=3)
    with pytest.raises(UserError, match=told + "scheduler"):
        generate(pipeline, [job])
    pipeline.scheduler = make_pipeline().scheduler
    assert fingerprints(pipeline) == same
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q"], init_lora_weights=False), "a")
    with_adapter = fingerprints(pipeline)["text encoder"]
    pipeline.text_encoder.disable_adapters()
    assert len({same["text encoder"], with_adapter, fingerprints(pipeline)["text encoder"]}) == 3
    pipeline = make_pipeline(make_t5())
    pipeline.transformer.set_attention_backend("_native_math")
    assert fingerprints(pipeline)["transformer"] != same["transformer"]
    pipeline = make_pipeline(make_t5())
    pipeline.transformer.enable_layerwise_casting(torch.float32, torch.bfloat16)
    assert fingerprints(pipeline)["transformer"] != same["transformer"]
    assert fingerprints(make_pipeline(make_t5()).to(torch.bfloat16))["vae"] != same["vae"]


def test_weights_count_as_they_are_computed_in(tmp_path, monkeypatch):
    """Half precision on a CPU without it becomes float32 when a video is made; before and after it is the same."""
    monkeypatch.setattr(precision, "cpu_supports", lambda dtype: False)
    pipeline, (job,) = make_pipeline().to(torch.bfloat16), asked(tmp_path)
    before = fingerprints(pipeline)
    generate(pipeline, [job])
    assert fingerprints(pipeline) == before and generate(pipeline, [job]).reused == [job.target]
    assert fingerprints(make_pipeline().to(torch.bfloat16)) == before


def test_latents_that_are_handed_over_count(tmp_path):
    pipeline, settings = make_pipeline(), [VideoFileParams(prompt="red", seed=3, **SIZE)]
    dark, light = (pipeline.encode_video(np.full((1, 16, 16, 3), grey, np.uint8)) for grey in (20, 220))
    generate(pipeline, build_requests(tmp_path, settings, dark))
    assert generate(pipeline, build_requests(tmp_path, settings, dark)).reused
    with pytest.raises(UserError, match=r"made otherwise .source"):
        generate(pipeline, build_requests(tmp_path, settings, light))


def test_a_video_of_an_earlier_pipeline_is_not_taken_for_the_one_that_was_to_replace_it(tmp_path, monkeypatch):
    """Killed between the latents and the video, when one of another pipeline was made anew."""
    first, second, (job,) = make_pipeline(), make_pipeline(group_size=1), asked(tmp_path)
    generate(first, [job])
    before = read_clip(job.target)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lvdm.generation.generate.VideoWriter.__exit__", lambda self, *error: killed())
        generate(second, [job], overwrite=True)
    assert job.latents.is_file() and np.array_equal(read_clip(job.target), before)
    assert generate(second, [job]).made == [job.target] and not np.array_equal(read_clip(job.target), before)


# ---- settings without effect ----


def test_components_that_are_assigned_are_checked():
    pipeline = make_pipeline()
    for wrong in (UniPCMultistepScheduler.from_config(pipeline.scheduler.config), None):
        pipeline.scheduler = wrong
        with pytest.raises(UserError, match="is not set up for flow matching"):
            pipeline("red", **SIZE)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline("red", **SIZE)
    for name, wrong in (("vae", AutoencoderKLODVAE(block_out_channels=(8,) * 4, norm_num_groups=4)),
                        ("text_encoder", WordHashEncoder(dim=8))):
        other = make_pipeline()
        setattr(other, name, wrong)
        with pytest.raises(UserError, match="the transformer was made for"):
            other("red", **SIZE)


def test_guidance_0_follows_the_negative_prompt_alone():
    pipeline = make_pipeline()

    def made(prompt, scale, negative=""):
        return pipeline(prompt, negative_prompt=negative, guidance_scale=scale, guidance_rescale=0.7, **SIZE).latents

    torch.testing.assert_close(made("red", 0.0), made("blue", 0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(made("red", 0.0, "blue"), made("blue", 1.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made("red", 2.0), made("blue", 2.0), atol=1e-3)


@pytest.mark.parametrize(("scale", "reference"), [(-2.0, 0), (0.0, 0), (0.4, 0.4), (1.0, 1), (3.0, 1)])
def test_only_contrast_that_guidance_adds_is_taken_back(scale, reference):
    torch.manual_seed(0)
    x, null, cond = torch.randn(3, 2, 4, 3, 8, 8)
    guided, wanted = guide(null, cond, scale)
    torch.testing.assert_close(guided, null + scale * (cond - null))
    torch.testing.assert_close(wanted, null + reference * (cond - null))
    clean = x - 0.6 * rescale_guidance(x, 0.6, wanted, guided, 1.0)
    torch.testing.assert_close(clean.std((2, 3, 4)), (x - 0.6 * (null + reference * (cond - null))).std((2, 3, 4)),
                               atol=1e-4, rtol=1e-4)
