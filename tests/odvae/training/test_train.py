"""Training an OD-VAE: resumed = uninterrupted bit for bit, a golden loss curve, and the commands around it."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from odvae import AutoencoderKLODVAE
from odvae.cli import main
from odvae.data.dataset import DataConfig, VideoClipDataset
from odvae.inference.loading import load_vae
from odvae.losses.perceptual import PerceptualLoss
from odvae.training.train import AutoencoderObjective, TrainConfig, make_model, stage_clips, train
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

TINY = ["data.height=32", "data.width=32", "data.frames=5", "data.held_out=2", "model.block_out_channels=[8,8,16]",
        "model.layers_per_block=1", "model.norm_num_groups=4", "model.patch_size=2", "loop.micro_batch_size=2",
        "loop.optimizer.name=muon", "loop.optimizer.learning_rate=2e-3", "loop.optimizer.warmup=5"]


def config(output: Path, clips: Path, *more: str) -> TrainConfig:
    return load_config(TrainConfig, None, [f"output={output}", f"data.folder={clips}", *TINY, *more])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{file.stem}.{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_resumed_is_uninterrupted_bit_for_bit(clips, tmp_path, monkeypatch):
    settings = ["loop.steps=7", "loop.save_every=3", "loop.log_every=2", "loop.evaluate_every=3", "data.zoom=[1, 2]"]
    train(config(tmp_path / "whole", clips, *settings))

    interrupted = config(tmp_path / "cut", clips, *settings)
    batch = VideoClipDataset.batch

    def stop_at_step_4(self, step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # as a cluster does before it reclaims the machine
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VideoClipDataset, "batch", stop_at_step_4)
        train(interrupted)
    assert not (tmp_path / "cut/vae").exists()
    assert not (tmp_path / "cut/checkpoints/step-00000007").exists()
    train(interrupted)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", step=7)

    # Killed after step 6: its checkpoint is left, and a log that is ahead of it.
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000007")
    shutil.rmtree(tmp_path / "cut/vae")
    train(interrupted)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", step=7)


def assert_same_run(one: Path, other: Path, step: int) -> None:
    a, b = weights(one, step), weights(other, step)
    assert a.keys() == b.keys() and any(k.startswith("optimizer1") for k in a)
    assert all(a[k].equal(b[k]) for k in a)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert (one / "vae" / name).read_bytes() == (other / "vae" / name).read_bytes()


def test_golden_loss_curve(clips, tmp_path):
    """Twenty steps on one thread; a refactoring must not change these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config(tmp_path, clips, "loop.steps=20", "loop.log_every=5", "loop.evaluate_every=100"))
    finally:
        torch.set_num_threads(threads)
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=5e-3)


GOLDEN = [0.30773, 0.23564, 0.20284, 0.20177]

LATENT = ["loss={l2: 1.0, local_correlation: {weight: 0.1, target: 1.0}, latent_masking: {weight: 0.5, start: 1}, "
          "future_dropping: {weight: 0.25}, latent_equivariance: {weight: 0.1}, decoder_equivariance: {weight: 0.25}}",
          "loop.log_every=1"]


def test_golden_curves_of_the_latent_terms(clips, tmp_path):
    """Four steps with all terms, also with checkpointing; the loss is their weighted sum."""
    logs = []
    for name, *settings in (("plain",), ("recomputed", "loop.gradient_checkpointing=full")):
        train(config(tmp_path / name, clips, *LATENT, "loop.steps=4", "loop.evaluate_every=100", *settings))
        log = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs.append([line for line in log if "loss" in line])
    assert [line["loss"] for line in logs[0]] == pytest.approx(GOLDEN_LATENT, rel=5e-3)
    weights = {"l1": 1, "l2": 1, "kl": 1e-6, "local_correlation": 0.1, "latent_masking": 0.5, "future_dropping": 0.25,
               "latent_equivariance": 0.1, "decoder_equivariance": 0.25}
    for one, other in zip(*logs, strict=True):
        assert ("latent_masking" in one) == (one["step"] > 1)  # steps in a log count from 1
        assert one["loss"] == pytest.approx(sum(w * one.get(term, 0) for term, w in weights.items()), rel=1e-5)
        assert all(other[term] == pytest.approx(one[term], rel=1e-4) for term in weights if term in one)
    assert (tmp_path / "plain/losses.png").is_file()


GOLDEN_LATENT = [1.22535, 1.26314, 1.03973, 0.97559]


def test_latent_terms_train_an_image_vae_and_stages_of_images(clips, tmp_path):
    without = LATENT[0].replace("future_dropping: {weight: 0.25}, ", "")
    train(config(tmp_path / "image", clips, without, "model.kind=image", "data.frames=1", "loop.steps=2"))
    assert all(map(math.isfinite, losses(tmp_path / "image")))

    settings = config(tmp_path / "stages", clips, *LATENT, "loop.steps=2",
                      "stages=[{steps: 1, data: {frames: 1}}, {steps: 1, freeze_encoder: true}]")
    objective = AutoencoderObjective(make_model(settings.model), settings)
    for step, data in enumerate(stage_clips(objective.stages)):
        with torch.autocast("cpu", torch.bfloat16):
            terms = objective(data.batch(step, 0, 2, 0), step, 0)
        terms["loss"].backward()
        assert all(value.isfinite() for value in terms.values())
        assert (terms["future_dropping"] > 0) == (step == 1)  # an image has no future
    with pytest.raises(UserError, match="future_dropping needs a causal video VAE"):
        train(config(tmp_path / "clip", clips, *LATENT, "model.norm=clip", "loop.steps=2"))


def test_image_stage_then_tail_inflation_by_the_commands(clips, tmp_path):
    image, video = tmp_path / "image", tmp_path / "video"
    tiny = [*TINY, f"data.folder={clips}", "loop.steps=2"]
    assert main(["train", *tiny, "data.frames=1", "model.kind=image", f"output={image}", "save_dtype=float16"]) == 0
    assert isinstance(load_vae(image / "vae"), AutoencoderKL)
    assert main(["train", *tiny, f"model.init_from={image / 'vae'}", f"output={video}"]) == 0
    vae = load_vae(video / "vae")
    assert isinstance(vae, AutoencoderKLODVAE) and len(vae.config.latents_mean) == 4
    assert (video / "config.yaml").is_file() and list((video / "samples").glob("*.png"))
    assert main(["reconstruct", str(clips), "--vae", str(video / "vae"), "--out", str(tmp_path / "r"),
                 "--limit", "2"]) == 0
    assert json.loads((tmp_path / "r/report.json").read_text())["psnr"] > 0
    assert len(list((tmp_path / "r").glob("*.mp4"))) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "loop.stepz=3"], "did you mean 'loop.steps'"),
    (["train", "data.folder=nowhere"], "nowhere"),
    (["train", "data.folder={empty}"], "no video"),
    (["train", "data.folder={clips}", "data.frames=5000"], "fewer than the 5000 of a window"),
    (["train", "data.folder={clips}", "model.init_from={empty}"], "is not a VAE's folder"),
    (["reconstruct", "{clips}", "--vae", "{empty}"], "is not a VAE's folder"),
    (["reconstruct", "{clips}", "--frames", "6"], "5 and 9"),
    (["cache", "build", "{empty}", "{empty}/cache"], "no video"),
    (["inflate", "{empty}", "{empty}/out"], "cannot load an image VAE"),
])
def test_user_errors_have_no_traceback(arguments, message, clips, vae_folder, tmp_path, capsys):
    filled = [a.format(clips=clips, empty=tmp_path) for a in arguments]
    if ("reconstruct" in filled and "--vae" not in filled) or filled[0] == "cache":
        filled += ["--vae", str(vae_folder)]
    if filled[0] == "train":
        filled.append(f"output={tmp_path / 'run'}")
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_of_another_config_is_not_overwritten(clips, tmp_path):
    train(config(tmp_path, clips, "loop.steps=1"))
    with pytest.raises(UserError, match=r"loop\.steps: 1 there, 2 here"):
        train(config(tmp_path, clips, "loop.steps=2"))


def poisoned(steps: set[int]):
    """`VideoClipDataset.batch` with pixels in these steps that make the loss infinite."""
    batch = VideoClipDataset.batch

    def poison(self, step, *rest):
        clean = batch(self, step, *rest)
        return replace(clean, video=clean.video.float() * 1e30 if step in steps else clean.video)
    return poison


def test_a_step_that_is_not_finite_is_skipped_and_its_clips_are_logged(clips, tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("odvae"), "warning", lambda text, *values: warnings.append(text % values))
    names = VideoClipDataset(config(tmp_path, clips).data).batch(2, 0, 2, 0).names
    monkeypatch.setattr(VideoClipDataset, "batch", poisoned({2}))
    train(config(tmp_path, clips, "loop.steps=3", "loop.save_every=1", "loop.log_every=3", "loop.keep=3"))
    assert warnings == [f"skipping step 2: the loss is not finite; its clips: {', '.join(names)}"]
    before, after = weights(tmp_path, 2), weights(tmp_path, 3)
    assert all(before[k].equal(after[k]) for k in before)
    (line,) = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in x)
    assert line["skipped"] == pytest.approx(1 / 3) and math.isfinite(line["loss"])
    trained = AutoencoderKLODVAE.load_config(tmp_path / "vae")  # measured on the clips, the bad ones left out
    assert all(map(math.isfinite, [*trained["latents_mean"], *trained["latents_std"]]))


def test_skipped_steps_in_a_row_stop_the_run_with_its_state_saved(clips, tmp_path, monkeypatch):
    settings = config(tmp_path, clips, "loop.steps=6", "loop.stop_after_skipped=2")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="2 consecutive steps up to step 4"):
        patch.setattr(VideoClipDataset, "batch", poisoned({1, 3, 4}))
        train(settings)
    assert (tmp_path / "checkpoints/step-00000005/meta.json").is_file()
    train(settings)  # resumes after them
    assert (tmp_path / "vae/config.json").is_file()


def test_batches_are_a_function_of_seed_step_and_rank(clips):
    one, other = (VideoClipDataset(DataConfig(folder=clips, height=32, width=32, frames=5, held_out=2, memory_mb=mb))
                  for mb in (100, 0))
    assert one.batch(3, 0, 2, 0).video.equal(other.batch(3, 0, 2, 0).video)
    for different in (one.batch(4, 0, 2, 0), one.batch(3, 1, 2, 0), one.batch(3, 0, 2, 1)):
        assert not different.video.equal(one.batch(3, 0, 2, 0).video)


# Images, then clips, then adversarial with the encoder frozen: the critic starts in step 7, two steps into its stage.
STAGES = ["stages=[{steps: 2, data: {frames: 1}}, {steps: 3}, {steps: 4, data: {frames: 9}, freeze_encoder: true, "
          "learning_rate: 0.5, loss: {l2: 1, adversarial: {weight: 0.5, start: 2, ramp: 4}}}]", "loop.steps=9",
          "loss.adversarial.critic.width=4", "loss.adversarial.critic.layers=2", "loop.log_every=1",
          "loss.adversarial.critic.gradient_penalty=1"]


def test_stages_with_a_critic_resume_bit_for_bit(clips, tmp_path, monkeypatch):
    """Interrupted within each stage, and around the critic's start."""
    batch, lengths = VideoClipDataset.batch, []

    def record(self, *arguments):
        drawn = batch(self, *arguments)
        lengths.append(drawn.video.shape[2])
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(VideoClipDataset, "batch", record)
        train(config(tmp_path / "whole", clips, *STAGES, "loop.save_every=1", "loop.keep=9"))
    assert lengths[:9] == [1, 1, 5, 5, 5, 9, 9, 9, 9]
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "critic" in line] == [8, 9]
    at = {step: weights(tmp_path / "whole", step) for step in range(1, 10)}

    def moved(part: str, one: int, other: int) -> bool:
        return any(not at[one][k].equal(at[other][k]) for k in at[one] if k.startswith(part))
    assert moved("model.encoder", 4, 5) and not moved("model.encoder", 5, 9) and moved("model.decoder", 5, 9)
    assert moved("critic_model", 7, 8) and not moved("critic_model", 1, 7)

    cut = config(tmp_path / "cut", clips, *STAGES, "loop.save_every=100")
    for stop in (1, 4, 6, 7):
        def killed(self, step, *rest, stop=stop):
            _ = step != stop or os.kill(os.getpid(), signal.SIGTERM)
            return batch(self, step, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(VideoClipDataset, "batch", killed)
            train(cut)
    train(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", step=9)


@pytest.mark.parametrize(("settings", "message"), [
    (["stages=[{steps: 2}]", "loop.steps=3"], "add up to 2 steps, but loop.steps is 3"),
    (["stages=[{steps: 3, data: {framez: 1}}]", "loop.steps=3"], r"stages.0.data: unknown key 'framez'.*'frames'"),
    (["stages=[{steps: 3, loss: {adversarial: {critic: {width: 8}}}}, {steps: 1}]", "loop.steps=4"],
     "share one network"),
    (["loop.trackers=[wandb]"], "wandb, which is not installed"),
    (["loop.sharding=full"], "AutoencoderObjective needs full copies"),
    (["loop.keep_best=psnr"], "'psnr' is not a metric .* psnr_heldout"),
])
def test_invalid_settings_fail_before_the_first_step(clips, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(config(tmp_path, clips, *settings))


@pytest.mark.parametrize("steps", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("critic", [["spectral_norm=true"], ["spectral_norm=false", "gradient_penalty=1"]])
def test_adversarial_steps_stay_finite(clips, tmp_path, critic, steps):
    """At 200 times the paper's learning rate, for both networks."""
    train(config(tmp_path, clips, "data.height=16", "data.width=16", f"loop.steps={steps}", "loop.optimizer.name=adamw",
                 "loss.adversarial.weight=0.5", "loss.adversarial.ramp=25", "loss.adversarial.critic.width=8",
                 "loss.adversarial.critic.layers=2", "loss.adversarial.critic.optimizer.learning_rate=2e-3",
                 f"loop.evaluate_every={steps}", *(f"loss.adversarial.critic.{setting}" for setting in critic)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["skipped"] == 0 and line["adaptive_weight"] < 100 for line in lines if "critic" in line)
    assert lines[-1]["psnr_heldout"] > lines[0]["psnr_heldout"]


def test_the_best_checkpoint_is_kept_and_trackers_get_metrics_and_images(clips, tmp_path, monkeypatch):
    values = iter([9.0, 1.0, 5.0, 2.0, 3.0])  # before the first step, then by step
    monkeypatch.setattr("odvae.training.heldout.psnr", lambda a, b: torch.tensor([next(values)]))
    train(config(tmp_path, clips, "loop.steps=4", "loop.keep=1", "loop.keep_best=psnr_heldout", "loop.log_every=1",
                 "loop.evaluate_every=1", "loop.trackers=[tensorboard]"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    written = b"".join(p.read_bytes() for p in (tmp_path / "trackers").rglob("*tfevents*"))
    assert all(tag in written for tag in (b"psnr_heldout", b"ssim_heldout", b"frames_per_second", b"samples", b"loss"))
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert all(line["frames_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in speed)


def test_perceptual_term_counts_from_its_stage(clips, tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def forward(self, a, b):
            return (a - b).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr("odvae.training.train.make_perceptual", lambda _: PerceptualLoss(Distance()))
    train(config(tmp_path, clips, "loop.steps=4", "loop.log_every=1", "loop.gradient_checkpointing=full",
                 "stages=[{steps: 1}, {steps: 3, loss: {perceptual: {weight: 1, start: 1, ramp: 2}}}]"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps if "perceptual" in line] == [3, 4]
    for line, weight in zip(steps, (0, 0, 0.5, 1), strict=True):  # this distance is L2's
        assert line["loss"] == pytest.approx(line["l1"] + 1e-6 * line["kl"] + weight * line["l2"], rel=1e-4)
    assert lines[-1]["perceptual_heldout"] > 0


@pytest.mark.slow
def test_killed_ten_times_is_uninterrupted(clips, tmp_path):
    """kill -9 at random moments; every time the same command resumes."""
    settings = [f"data.folder={clips}", *TINY, "loop.steps=400", "loop.save_every=5", "loop.log_every=5"]

    def start(run: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "odvae", "train", f"output={tmp_path / run}", *settings],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    moments, killed = random.Random(0), 0
    for _ in range(10):
        process = start("cut")
        try:
            process.wait(timeout=moments.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    assert start("cut").wait() == 0
    assert killed
    assert_same_run(tmp_path / "whole", tmp_path / "cut", step=400)
    assert not list((tmp_path / "cut").rglob("*.tmp-*"))
