"""Training in two processes on one machine, by gloo."""

from __future__ import annotations

import json

import pytest
import torch
from processes import run_forked, run_torchrun
from safetensors.torch import load_file

from lvdm.cli import main as lvdm
from odvae.cli import main as odvae
from odvae.trainer.checkpoints import load_checkpoint


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_vae_with_a_critic_trains_alike_in_two_processes_and_with_accumulation(clips, vae_folder, tmp_path,
                                                                                optimizer):
    """Two processes of one micro-batch per step compute what one process of two micro-batches does."""
    settings = [f"data.folder={clips}", "data.frames=5", "data.height=32", "data.width=32", "data.held_out=2",
                f"model.init_from={vae_folder}", "loop.steps=4", "loop.micro_batch_size=2",
                "loop.optimizer.learning_rate=1e-3", f"loop.optimizer.name={optimizer}", "loop.optimizer.warmup=0",
                "loss.adversarial.weight=0.5", "loss.adversarial.start=1", "loss.adversarial.critic.width=4",
                "loss.adversarial.critic.layers=2", "loss.adversarial.critic.optimizer.warmup=0",
                "loss.adversarial.critic.spectral_norm=false", "stages=[{steps: 2}, {steps: 2, freeze_encoder: true}]"]
    command = ["train", *settings, f"output={tmp_path / 'two'}"]
    if optimizer == "adamw":
        run_torchrun("-m", "odvae", *command)
    else:
        run_forked("odvae", *command, log=tmp_path / "log")
    assert (tmp_path / "two/vae/config.json").is_file()
    meta = json.loads((tmp_path / "two/checkpoints/step-00000004/meta.json").read_text())["meta"]
    assert meta["samples"] == 4, "per step, of two processes"
    assert odvae(["train", *settings, "loop.gradient_accumulation_steps=2", f"output={tmp_path / 'one'}"]) == 0
    for part in ("model", "critic_model", "ema"):
        two, one = (load_file(tmp_path / run / f"checkpoints/step-00000004/{part}.safetensors")
                    for run in ("two", "one"))
        assert two.keys() == one.keys()
        # Over all values together: where a gradient is near zero, as a bias's before a norm, AdamW's step follows the
        # sign of rounding errors. One micro-batch instead of two (measured, without a critic) moves them by 1.4e-3.
        difference = torch.cat([(two[key].float() - one[key].float()).flatten() for key in two])
        assert difference.square().mean().sqrt() < 1e-4, part


def test_an_lvdm_trains_alike_in_two_processes_in_shards_and_with_accumulation(cache, vae_folder, tmp_path):
    """As in one process with twice the batch: a sample's noise depends on its index in the step."""
    settings = ["train", f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2", "model.hidden_size=24",
                "model.num_layers=1", "model.num_attention_heads=2", "loop.log_every=1", "loop.steps=4",
                "loop.evaluate_every=4", "loop.optimizer.warmup=0", "loop.optimizer.learning_rate=1e-3"]
    half, sample = [*settings, "loop.micro_batch_size=2"], ["sample.count=1", "sample.steps=1"]
    run_forked("lvdm", *half, *sample, f"output={tmp_path / 'two'}", log=tmp_path / "log")
    run_forked("lvdm", *half, *sample, "loop.sharding=full", f"output={tmp_path / 'shards'}", log=tmp_path / "log")
    assert lvdm([*settings, "sample.count=0", "loop.micro_batch_size=4", f"output={tmp_path / 'one'}"]) == 0
    assert lvdm([*half, "sample.count=0", "loop.gradient_accumulation_steps=2", f"output={tmp_path / 'passes'}"]) == 0
    losses = {}
    for run in ("one", "two", "shards", "passes"):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        steps, losses[run] = zip(*((line["step"], line["loss"]) for line in lines if "loss" in line), strict=True)
        assert steps == (1, 2, 3, 4)  # only one process writes the log
        assert losses[run] == pytest.approx(losses["one"], rel=1e-4), run
    for run in ("two", "shards"):  # the average is saved
        average = load_checkpoint(tmp_path / run / "checkpoints/step-00000004")[0]["ema"]
        saved = load_file(tmp_path / run / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in average.values())
        sums = [sum(float(tensor.double().sum()) for tensor in tensors.values()) for tensors in (average, saved)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-6), run
