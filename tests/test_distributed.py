"""Two processes on one machine, by gloo."""

from __future__ import annotations

import json

import pytest
import torch
from processes import fork, launch
from safetensors.torch import load_file

from lvdm.cli import main as lvdm
from odvae.cli import main


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_stands_in_for_processes_with_a_critic_too(clips, vae_folder, tmp_path, optimizer):
    """Two processes of one pass a step train what one process of two passes trains."""
    settings = [
        f"data.folder={clips}",
        "data.frames=5",
        "data.height=32",
        "data.width=32",
        "data.held_out=2",
        f"model.init_from={vae_folder}",
        "loop.steps=4",
        "loop.micro_batch_size=2",
        "loop.optimizer.learning_rate=1e-3",
        f"loop.optimizer.name={optimizer}",
        "loop.optimizer.warmup=0",
        "loss.adversarial.weight=0.5",
        "loss.adversarial.start=1",
        "loss.adversarial.critic.width=4",
        "loss.adversarial.critic.layers=2",
        "loss.adversarial.critic.optimizer.warmup=0",
        "loss.adversarial.critic.spectral_norm=false",
        "stages=[{steps: 2}, {steps: 2, freeze_encoder: true}]",
    ]
    fork("odvae", "train", *settings, f"output={tmp_path / 'two'}", log=tmp_path / "log")
    assert main(["train", *settings, "loop.gradient_accumulation_steps=2", f"output={tmp_path / 'one'}"]) == 0
    for part in ("model", "critic_model", "ema"):
        two, one = (load_file(tmp_path / run / f"checkpoints/step-00000004/{part}.safetensors")
                    for run in ("two", "one"))
        assert two.keys() == one.keys()
        # Over all values together: where a gradient is near zero, as a bias's before a norm, AdamW's step follows its
        # rounding's sign. One pass for two (measured, without a critic) moves them by 1.4e-3.
        difference = torch.cat([(two[key].float() - one[key].float()).flatten() for key in two])
        assert difference.square().mean().sqrt() < 1e-4, part


LOOP = ["loop.steps=4", "loop.micro_batch_size=2", "loop.log_every=1", "loop.evaluate_every=4"]


def test_two_processes_give_the_loss_of_one_with_twice_the_batch(cache, vae_folder, tmp_path):
    """And so do two passes: a sample's noise goes by its number in the step, whoever draws it."""
    settings = [f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2", "model.hidden_size=24",
                "model.num_layers=2", "model.num_attention_heads=2", "sample.count=0", "loop.steps=6",
                "loop.log_every=1", "loop.optimizer.warmup=0", "loop.optimizer.learning_rate=1e-3"]
    for run, more in ("two", ()), ("shards", ("loop.sharding=full",)):
        fork(
            "lvdm",
            "train",
            *settings,
            "loop.micro_batch_size=2",
            *more,
            f"output={tmp_path / run}",
            log=tmp_path / "log",
        )
    assert lvdm(["train", *settings, "loop.micro_batch_size=4", f"output={tmp_path / 'one'}"]) == 0
    assert (
        lvdm(
            [
                "train",
                *settings,
                "loop.micro_batch_size=2",
                "loop.gradient_accumulation_steps=2",
                f"output={tmp_path / 'passes'}",
            ]
        )
        == 0
    )
    losses = {}
    for run in ("one", "two", "shards", "passes"):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        losses[run] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["one"]) == 6
    for run in ("two", "shards", "passes"):
        assert losses[run] == pytest.approx(losses["one"], rel=1e-4), run


def test_a_vae_trains_in_two_processes_of_torchrun(clips, vae_folder, tmp_path):
    launch("-m", "odvae", "train", *LOOP, f"data.folder={clips}", "data.frames=5", "data.height=32", "data.width=32",
           "data.held_out=2", f"model.init_from={vae_folder}", f"output={tmp_path}")
    assert (tmp_path / "vae/config.json").is_file()
    about = json.loads((tmp_path / "checkpoints/step-00000004/meta.json").read_text())
    assert about["meta"]["samples"] == 4, "a step's, of two processes"


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_an_lvdm_trains_in_two_processes(cache, vae_folder, tmp_path, sharding):
    fork("lvdm", "train", *LOOP, f"windows.cache={cache}", f"vae={vae_folder}", "windows.held_out=2",
           "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2", "sample.count=1",
           "sample.steps=1", f"loop.sharding={sharding}", f"output={tmp_path}", log=tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # one process writes the log
    average = load_file(tmp_path / "checkpoints/step-00000004/ema.safetensors")
    saved = load_file(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in average.values())
    sums = [sum(float(tensor.double().sum()) for tensor in tensors.values()) for tensors in (average, saved)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)  # what is saved is the average
