"""Training an LVDM: resumed = uninterrupted bit for bit, a golden loss curve, and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvdm.cli import main
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.pipeline import LVDMPipeline
from lvdm.train import TrainConfig, train
from lvdm.windows import LatentWindows
from odvae import AutoencoderKLODVAE
from odvae.runtime.config import load_config
from odvae.runtime.errors import UserError

TINY = ["windows.held_out=2", "model.hidden_size=24", "model.num_layers=2", "model.num_attention_heads=2",
        "sample.count=1", "sample.steps=2", "loop.batch=4", "loop.optimizer.name=muon",
        "loop.optimizer.learning_rate=2e-3", "loop.optimizer.warmup=5"]


@pytest.fixture
def config(cache, vae_folder):
    def make(output: Path, *more: str) -> TrainConfig:
        return load_config(TrainConfig, None,
                           [f"output={output}", f"windows.cache={cache}", f"vae={vae_folder}", *TINY, *more])
    return make


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{file.stem}.{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_resumed_is_uninterrupted_bit_for_bit(config, tmp_path, monkeypatch):
    settings = ["loop.steps=7", "loop.save_every=3", "loop.log_every=2", "loop.evaluate_every=3"]
    train(config(tmp_path / "whole", *settings))
    cut, batch = config(tmp_path / "cut", *settings), LatentWindows.batch

    def stop_at_step_4(self, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentWindows, "batch", stop_at_step_4)
        train(cut)
    assert not (tmp_path / "cut/pipeline").exists()
    train(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000007")  # killed after step 6
    shutil.rmtree(tmp_path / "cut/pipeline")
    train(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def assert_same_run(one: Path, other: Path) -> None:
    a, b = weights(one, 7), weights(other, 7)
    assert a.keys() == b.keys() and any(k.startswith("optimizer1") for k in a)
    assert all(a[k].equal(b[k]) for k in a)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (one / file).read_bytes() == (other / file).read_bytes()


def test_golden_loss_curve(config, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config(tmp_path, "loop.steps=20", "loop.log_every=5", "loop.evaluate_every=100", "sample.count=0",
                     "loop.optimizer.name=adamw"))
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(GOLDEN, rel=5e-3)


GOLDEN = [0.98323, 0.96945, 0.91246, 0.83479]


def test_train_then_generate_by_the_commands(cache, vae_folder, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *TINY, f"windows.cache={cache}", f"vae={vae_folder}", f"output={run}", "loop.steps=2",
                 "loop.evaluate_every=1", "save_dtype=float16"]) == 0
    assert (run / "loss.png").is_file() and len(list((run / "samples").glob("*.png"))) == 3  # before, 1, 2
    assert main(["generate", "a red circle", "--pipeline", str(run / "pipeline"), "--frames", "9", "--steps", "2",
                 "--out", str(tmp_path / "made"), "--scale", "2"]) == 0
    from odvae.data.video import probe

    (made,) = (tmp_path / "made").glob("*.mp4")
    info = probe(made)
    assert (info.frames, info.height, info.width, round(info.frame_rate)) == (9, 64, 64, 8)
    assert main(["generate", "and on", "--pipeline", str(run / "pipeline"), "--frames", "17", "--steps", "1",
                 "--video", str(made), "--out", str(tmp_path / "longer")]) == 0
    assert probe(tmp_path / "longer/00-and-on.mp4").frames == 17
    again = LVDMPipeline.from_pretrained(run / "pipeline")
    assert again.transformer.dtype == torch.float32


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "model.hiden_size=3"], "did you mean 'model.hidden_size'"),
    (["train", "windows.cache={empty}", "vae={vae}"], "is not a latent cache"),
    (["train", "windows.cache={cache}", "vae={other}"], "another VAE"),
    (["train", "windows.cache={cache}", "vae={vae}", "windows.frames=13"], "the nearest are 9 and 17"),
    (["train", "windows.cache={cache}", "vae={empty}"], "is not a VAE's folder"),
    (["train", "windows.cache={cache}", "vae={vae}", "model.init_from={fast}"], "frame_rate: 24.0 there, 8.0 here"),
    (["generate", "x", "--pipeline", "{empty}"], "is not a pipeline's folder"),
])
def test_mistakes_are_told_without_a_traceback(arguments, message, cache, vae_folder, tmp_path, capsys):
    other = tmp_path / "other"
    torch.manual_seed(1)  # the other VAE has seed 0
    AutoencoderKLODVAE(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
                       patch_size=2).save_pretrained(other)
    empty, fast = tmp_path / "empty", tmp_path / "fast"
    empty.mkdir()
    LVDMTransformer3DModel(hidden_size=32, num_layers=1, num_attention_heads=2, frame_rate=24.0).save_pretrained(fast)
    filled = [a.format(cache=cache, vae=vae_folder, empty=empty, other=other, fast=fast) for a in arguments]
    if filled[0] == "train":
        filled.append(f"output={tmp_path / 'run'}")
    assert main(filled) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def test_a_run_of_another_config_is_not_overwritten(config, tmp_path):
    train(config(tmp_path, "loop.steps=1", "sample.count=0"))
    with pytest.raises(UserError, match="loop differ"):
        train(config(tmp_path, "loop.steps=2", "sample.count=0"))
