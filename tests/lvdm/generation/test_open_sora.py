"""Videos of Open-Sora-Plan as files: generated, decoded again, resumed, and with a LoRA; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import save_adapter
from tiny_open_sora import make_open_sora_pipeline

from lvdm.cli import main
from lvdm.generation.latent_store import read_latents, read_settings
from lvdm.sampling.loading import load_pipeline
from odvae.data.video.reader import read_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open-sora")
    make_open_sora_pipeline().save_pretrained(folder / "pipeline")
    save_adapter(load_pipeline(folder / "pipeline").transformer, folder, name="style.safetensors")
    return folder


def generate(folder, out, *options):
    return main(["generate", "a red balloon", "--pipeline", str(folder / "pipeline"), "--out", str(out),
                 "--num-inference-steps", "3", *options])


def test_a_video_its_latents_and_its_settings(folder, tmp_path, capsys):
    length = ("--num-frames", "37", "--seed", "5")  # 10 latent frames: groups of 8 and 2 are decoded
    assert generate(folder, tmp_path, *length) == 0
    video = tmp_path / "00-a-red-balloon.mp4"
    settings = read_settings(video)
    assert (settings["guidance_scale"], settings["frame_rate"], settings["height"]) == (7.5, 24.0, 16)
    _, latents = read_latents(video)
    pipeline = load_pipeline(folder / "pipeline")
    expected = pipeline("a red balloon", num_frames=37, seed=5, num_inference_steps=3, output_type="latent").latents
    torch.testing.assert_close(latents, expected[0], atol=1e-4, rtol=0)
    frames = read_clip(video)
    assert len(frames) == 37
    assert generate(folder, tmp_path, *length) == 0 and "already exists" in capsys.readouterr().out
    video.unlink()  # it is decoded again
    assert generate(folder, tmp_path, *length) == 0
    np.testing.assert_array_equal(read_clip(video), frames)
    assert generate(folder, tmp_path, *length, "--scheduler", "ddim") == 2, "another scheduler is another video"


def test_a_lora_is_in_the_video_and_one_that_does_not_fit_is_named(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "plain", "--num-frames", "5") == 0
    half = f"{folder / 'style.safetensors'}:0.5"
    assert generate(folder, tmp_path / "lora", "--num-frames", "5", "--lora", half) == 0
    plain, adapted = (next((tmp_path / name).glob("*.mp4")) for name in ("plain", "lora"))
    assert read_settings(adapted)["adapters"]["style"].startswith("0.5 ") and "adapters" not in read_settings(plain)
    latents = [load_file(video.with_suffix(".safetensors"))["latents"] for video in (plain, adapted)]
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    for lora, message in ((folder / "pipeline/vae/diffusion_pytorch_model.safetensors", "is not a LoRA"),
                          (folder / "gone.safetensors", "there is no such file"),
                          (f"{folder / 'style.safetensors'}:inf", "finite number")):
        assert generate(folder, tmp_path / "bad", "--lora", str(lora)) == 2
        assert message in capsys.readouterr().err
    assert main(["generate", "red", "--lora", str(folder / "style.safetensors"), "--out", str(tmp_path / "bad")]) == 2
    assert "style.safetensors: is for another model than this LVDMPipeline" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_what_it_cannot_do_is_refused(folder, tmp_path, capsys):
    assert generate(folder, tmp_path, "--scheduler", "heun") == 2
    assert "scheduler" in capsys.readouterr().err
    assert generate(folder, tmp_path, "--history-groups", "3") == 2
    assert "whole video at once" in capsys.readouterr().err
