"""Distilling a decoder: golden steps, resumed = uninterrupted, from videos, caches and VAEs of diffusers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odvae.cli import main
from odvae.data.dataset import VideoClipDataset
from odvae.inference.loading import load_decoder, load_vae
from odvae.training.distill import DistillConfig, distill
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

TINY = ["data.height=32", "data.width=32", "data.frames=5", "data.held_out=2", "loop.micro_batch_size=2",
        "decoder.widths=[8,8,8]", "decoder.blocks=[1,1,1]", "loop.optimizer.name=muon",
        "loop.optimizer.learning_rate=1e-2", "loop.optimizer.warmup=2", "loop.log_every=2", "loop.steps=6"]


def config(output: Path, vae: Path, *more: str) -> DistillConfig:
    return load_config(DistillConfig, None, [f"output={output}", f"vae={vae}", *TINY, *more])


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_golden_steps_and_resuming_bit_for_bit(clips, vae_folder, tmp_path, monkeypatch):
    settings = [f"data.folder={clips}", "loss.source=0.5", "loop.save_every=4"]
    folder = distill(config(tmp_path / "whole", vae_folder, *settings))
    log = metrics(tmp_path / "whole")
    assert [line["loss"] for line in log if "loss" in line] == pytest.approx(GOLDEN, rel=5e-3)
    assert log[-1]["psnr_teacher_heldout"] > log[0]["psnr_teacher_heldout"]
    assert {"psnr_heldout", "teacher_psnr_heldout"} < log[-1].keys()
    assert (tmp_path / "whole/psnr.png").is_file() and list((tmp_path / "whole/samples").glob("*.png"))

    batch, drawn = VideoClipDataset.batch, []

    def stop_at_step_4(self, step, *rest):
        drawn.append(step)
        if drawn.count(4) == 2:  # first for the latents' statistics, before the training
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, *rest)

    cut = config(tmp_path / "cut", vae_folder, *settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VideoClipDataset, "batch", stop_at_step_4)
        distill(cut)
    name = "diffusion_pytorch_model.safetensors"
    one, other = load_file(folder / name), load_file(distill(cut) / name)
    assert all(one[key].equal(other[key]) for key in one) and metrics(tmp_path / "cut") == log


GOLDEN = [0.74718, 0.58588, 0.54845]


def test_the_command_distills_on_a_latent_cache(cache, vae_folder, tmp_path):
    assert main(["distill", str(vae_folder), str(tmp_path), *TINY, f"cache={cache}", "loop.steps=2",
                 "save_dtype=float16"]) == 0
    decoder = load_decoder(tmp_path, load_vae(vae_folder))
    assert decoder.decode(torch.zeros(1, 4, 2, 4, 4)).sample.shape == (1, 3, 5, 32, 32)
    assert len(decoder.config.latents_std) == 4 and len(decoder.config.vae_fingerprint) == 64
    last = metrics(tmp_path)[-1]
    assert "psnr_teacher_heldout" in last and "psnr_heldout" not in last  # a cache has no footage


def test_a_vae_of_diffusers_is_a_teacher(clips, tmp_path):
    from tiny_diffusers import make_diffusers_pipeline

    vae = make_diffusers_pipeline("WanPipeline").vae
    vae.save_pretrained(tmp_path / "wan")
    distill(config(tmp_path, tmp_path / "wan", f"data.folder={clips}", "loop.steps=1"))
    decoder = load_decoder(tmp_path, vae)
    z = torch.randn(1, vae.config.z_dim, 2, 4, 4)
    with torch.no_grad():
        assert decoder.decode(z).sample.shape == vae.decode(z).sample.shape


@pytest.mark.parametrize(("settings", "message"), [
    (["loss.teacher=0"], "nothing to learn from"),
    (["cache={cache}", "loss.source=1"], "holds latents only"),
    (["data.frames=6"], "the next that do have 9 frames of 32x32"),
    (["decoder.time_growth=[2,3]"], "temporal compression, 4"),
])
def test_settings_that_do_not_fit_are_refused(clips, cache, vae_folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        distill(config(tmp_path, vae_folder, f"data.folder={clips}", *(s.format(cache=cache) for s in settings)))
