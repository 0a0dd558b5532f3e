"""NaN and infinity are reported with the component that gave them, and leave no files."""

import operator

import numpy as np
import pytest
import torch
from pipelines import SIZE, make_pipeline, make_requests, make_t5
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lvdm.cli import main
from lvdm.generation.generate import generate
from odvae.utils.errors import NonFiniteError, UserError

NAN, INF = float("nan"), float("inf")


def corrupt(module, value):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("component", "message"), [
    ("transformer.project_out", r"the transformer gave NaN or infinity .*project_out\.weight is not finite"),
    ("vae.decoder.conv_out", r"the VAE's decoder gave NaN or infinity .*decoder\.conv_out\.weight is not finite"),
    ("text_encoder.encoder.block", "the text encoder gave NaN or infinity")])
def test_the_component_is_named_and_no_file_is_left(component, message, value, tmp_path):
    pipeline = make_pipeline(make_t5())
    corrupt(operator.attrgetter(component)(pipeline), value)
    with pytest.raises(NonFiniteError, match=message):
        pipeline("red", **SIZE)
    with pytest.raises(NonFiniteError, match=message):
        generate(pipeline, make_requests(tmp_path, ["red", "blue"]))
    assert not list(tmp_path.iterdir())


def test_the_vaes_encoder_is_named():
    pipeline = make_pipeline()
    corrupt(pipeline.vae.encoder.conv_in, NAN)
    with pytest.raises(NonFiniteError, match="the VAE's encoder"):
        pipeline("red", image=np.zeros((16, 16, 3), np.uint8), **SIZE)


def test_a_failure_in_a_later_group_leaves_nothing_to_resume(tmp_path, monkeypatch):
    """Only one of two videos fails, in its second group."""
    pipeline = make_pipeline()
    forward = pipeline.transformer.forward

    def failing_forward(latents, timestep, text, *args, **kwargs):
        output = forward(latents, timestep, text, *args, **kwargs)
        if not kwargs.get("return_history") and latents.shape[2] == 2:
            output.sample[(text[:, 1, 0] - blue).abs() < 1e-6] = NAN
        return output

    blue = pipeline.text_encoder.encode(["blue"])[0][0, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.transformer, "forward", failing_forward)
        report = generate(pipeline, make_requests(tmp_path, ["red", "blue"]))
    assert [p.name for p in report.generated] == ["00-red.mp4"] and report.non_finite == [tmp_path / "01-blue.mp4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00-red.mp4", "00-red.safetensors"]
    again = generate(pipeline, make_requests(tmp_path, ["red", "blue"]))
    assert [p.name for p in again.reused] == ["00-red.mp4"] and [p.name for p in again.generated] == ["01-blue.mp4"]


@pytest.mark.parametrize("change", [
    *({name: value} for name in ("guidance_scale", "guidance_rescale", "shift", "frame_rate", "history_noise")
      for value in (NAN, INF, -INF)),
    {"prompt": [(0, "red"), (NAN, "blue")]}, {"prompt": [(0, "red"), (INF, "blue")]},
    {"video_latents": torch.full((1, 2, 1, 2, 2), NAN)}], ids=str)
def test_a_parameter_that_is_not_finite_is_refused_at_once(change):
    with pytest.raises(UserError, match=next(iter(change)).partition("_")[0] + "|latents"):
        make_pipeline().stream(**{"prompt": "red"} | SIZE | change)


@pytest.mark.parametrize("change", [{"batch": 0}, {"height": 0}], ids=str)
def test_zero_is_not_a_size(change):
    with pytest.raises(UserError):
        make_pipeline().requirements(**change)
    with pytest.raises(UserError, match="batch=0"):
        generate(make_pipeline(), [], batch=0)


def test_exit_status_of_the_commands(tmp_path, capsys):
    pipeline, folder, out = make_pipeline(), tmp_path / "pipeline", tmp_path / "out"
    pipeline.save_pretrained(folder)
    command = [
        "generate",
        "red",
        "--pipeline",
        str(folder),
        "--out",
        str(out),
        "--num-frames",
        "5",
        "--num-inference-steps",
        "1",
    ]
    for option in ("--guidance-scale", "--guidance-rescale", "--shift", "--frame-rate", "--history-noise"):
        for value in ("nan", "inf", "-inf"):
            assert main([*command, f"{option}={value}"]) == 2
            assert option[2:].replace("-", "_") in capsys.readouterr().err
    assert main(["evaluate", "--pipeline", str(folder), "--out", str(out), "--guidance-scale", "nan"]) == 2
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file(whole | {"decoder.conv_in.bias": whole["decoder.conv_in.bias"] * NAN}, weights, {"format": "pt"})
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "error: the VAE's decoder gave NaN" in error and "decoder.conv_in.bias" in error and "Traceback" not in error
    assert not list(out.glob("*"))
    save_file(whole, weights, {"format": "pt"})
    assert main(command) == 0 and "1 generated, 0 reused" in capsys.readouterr().out


def test_stored_latents_that_are_not_finite_are_not_reused(tmp_path):
    """A version without this check may have written them."""
    pipeline, (request,) = make_pipeline(), make_requests(tmp_path)
    generate(pipeline, [request])
    with safe_open(request.latents, "pt") as file:
        metadata = file.metadata()
    save_file({"latents": load_file(request.latents)["latents"] * NAN}, request.latents, metadata)
    with pytest.raises(UserError, match=r"contains NaN or infinity; generate the video again with --overwrite"):
        generate(pipeline, [request])
    assert generate(pipeline, [request], overwrite=True).generated
