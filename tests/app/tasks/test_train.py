"""Training jobs: stopped and resumed = uninterrupted, the exported assets, validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from task_harness import TaskHarness

from app.storage.jobs import JobKind, JobSignal, JobState
from app.tasks.train import validate
from app.tasks.training_log import read_lines, series_of
from lvdm.sampling.pipeline import LVDMPipeline
from lvdm.training.train import TrainConfig, train
from odvae.training.train import TrainConfig as VaeConfig
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

QUICK = {"steps": 24, "micro_batch_size": 2, "optimizer": "adamw", "learning_rate": 2e-3, "warmup": 2, "log_every": 1,
         "evaluate_every": 100, "save_every": 100, "samples": 1, "sample_steps": 1, "held_out": 2,
         "frames": 9}  # fmt: skip


@pytest.fixture
def tasks(tmp_path, clips, cache, vae_folder) -> TaskHarness:
    return TaskHarness(tmp_path, clips, cache.parent, vae_folder, tmp_path / "made")


def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one(tasks, cache, tmp_path):
    job = tasks.submit(JobKind.TRAIN, name="mine", caches=[tasks.asset("cache", cache)], **QUICK)
    assert job.title == "Train mine" and validate(job.params, tasks.services, "") == (job.params, job.title)

    def stop_after_two(context, changes):
        if changes.get("phase") == "train" and changes["done"] >= 2:
            context.services.store.signal(context.job.id, JobSignal.STOP)

    run = tmp_path / "made/runs/mine"
    stopped = tasks.run(stop_after_two)
    step = stopped.result["step"]
    assert stopped.state is JobState.STOPPED and 2 <= step < 24
    half = tasks.services.assets.list("pipeline")  # what it was when it was stopped can be generated with
    assert [(one.name, one.detail) for one in half] == [(f"made/runs/mine/stopped/step-{step:08d}", f"step {step}")]
    video = LVDMPipeline.from_pretrained(half[0].path)(
        "a red circle", num_frames=5, num_inference_steps=1, seed=0
    ).frames
    assert video.shape == (1, 5, 32, 32, 3)

    tasks.service.resume(job.id, "")
    done = tasks.run()
    config = tasks.services.job_files.folder(job) / "train.yaml"
    train(load_config(TrainConfig, config, [f"output={tmp_path / 'whole'}"]))
    for name in ("checkpoints/step-00000024/model", "checkpoints/step-00000024/ema",
                 "pipeline/transformer/diffusion_pytorch_model"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (run, tmp_path / "whole"))
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
    assert (run / "metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()

    result, folder = done.result, tasks.services.job_files.folder(job)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert result["losses"]["loss"] == last["loss"] and (result["step"], result["steps"]) == (24, 24)
    assert result["tokens_per_second"] > 0 and result["samples_per_second"] > 0 and result["sample_step"] == 24
    assert result["series"]["loss"][-1][0] == 24 and "loss_heldout" in result["series"]
    with Image.open(folder / "sheet.webp") as picture:
        assert picture.format == "WEBP"
    offered = {asset.name: asset for asset in tasks.services.assets.list("pipeline")}
    assert result["asset"] == offered["made/runs/mine/pipeline"].id
    assert offered["made/runs/mine/pipeline"].detail == "step 24"

    # The run can go on to more steps, and be logged otherwise.
    longer = tasks.submit(JobKind.TRAIN, run=tasks.asset("run", run), steps=26, evaluate_every=1, samples=0)
    assert longer.params["steps"] == 26 and validate(longer.params, tasks.services, "")[0] == longer.params
    found = tasks.run()
    assert (found.state, found.result["step"], found.result["steps"]) == (JobState.DONE, 26, 26)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss_heldout" in line] == [0, 24, 25, 26]

    # The run can be resumed from the list, and by the same job, but no other job may have its name.
    again = tasks.submit(JobKind.TRAIN, run=tasks.asset("run", run))
    assert again.title == "Resume made/runs/mine" and again.params["model"] == "lvdm"
    tasks.service.duplicate(job.id, "")
    with pytest.raises(UserError, match="mine is already queued or running"):
        tasks.submit(JobKind.TRAIN, **{**job.params, "seed": 5})


def test_the_config_of_an_odvae_training(tasks, clips, monkeypatch):
    """The config that is written is one that `odvae train` takes."""
    seen = []
    monkeypatch.setattr(
        "app.tasks.train.run_command", lambda context, module, arguments, tick: seen.append(arguments[1])
    )
    tasks.submit(
        JobKind.TRAIN,
        model="odvae",
        name="vae",
        videos=tasks.asset("videos", clips),
        init_from="shipped",
        frames=9,
        height=32,
        width=48,
        mixed_precision="bf16",
        learning_rate=1e-5,
        freeze_encoder=True,
    )
    tasks.run()
    config = load_config(VaeConfig, seen[0])
    assert config.data.folder == clips and (config.data.frames, config.data.height, config.data.width) == (9, 32, 48)
    assert config.model.init_from is not None and config.model.init_from.name == "natural" and config.freeze_encoder
    assert (config.loop.mixed_precision, config.loop.optimizer.learning_rate) == ("bf16", 1e-5)


def test_what_is_refused(tasks, clips, cache, tmp_path):
    one, videos = tasks.asset("cache", cache), tasks.asset("videos", clips)
    run = tmp_path / "made/runs/moved"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("output: /elsewhere\nwindows: {}\nmodel: {}\nloop: {}\n")
    (run / "metrics.jsonl").touch()
    right = tmp_path / "made/runs/right"
    right.mkdir()
    (right / "config.yaml").write_text(f"output: {right}\nwindows: {{}}\nmodel: {{}}\nloop: {{}}\n")
    (right / "metrics.jsonl").touch()
    for raw, message in [
        ({}, "Give the new training a name"),
        ({"name": "a"}, "Pick a latent cache"),
        ({"name": "a", "model": "odvae"}, "Pick a folder of videos to train on"),
        ({"name": "a", "model": "gan"}, "'lvdm' or 'odvae'"),
        ({"name": "a", "caches": [videos]}, "no such cache"),
        ({"name": "a", "caches": ["../x"]}, "no such cache"),
        ({"name": "a", "caches": ["x" * 10**5]}, "must be one from the list"),
        ({"name": "a", "caches": [one], "init_from": one}, "no such pipeline"),
        ({"name": "a", "caches": [one], "vae": "/etc/passwd"}, "no such VAE"),
        ({"name": "../a", "caches": [one]}, "The name must"),
        ({"name": "a", "caches": [one], "frames": 16}, "such as 13 or 17"),
        ({"name": "a", "caches": [one], "learning_rate": float("nan")}, "learning_rate"),
        ({"name": "a", "caches": [one], "steps": 10**12}, "steps"),
        ({"name": "a", "caches": [one], "preset": "9t"}, "5m, 30m"),
        ({"name": "a", "caches": [one], "lora": 4}, "LoRA needs trained weights"),
        ({"name": "a", "videos": videos, "model": "odvae", "height": 60}, "multiple of 8, such as 56 or 64"),
        ({"run": one}, "no such training"),
        ({"run": tasks.asset("run", run)}, "started in /elsewhere"),
        ({"run": tasks.asset("run", run), "name": "a"}, "not both"),
        ({"run": tasks.asset("run", right), "learning_rate": 1e-4, "seed": 3}, "learning_rate, seed: cannot change"),
        ({"run": tasks.asset("run", right), "steps": 0}, "steps"),
    ]:
        with pytest.raises(UserError, match=message) as found:
            tasks.submit(JobKind.TRAIN, **raw)
        assert len(str(found.value)) < 500


def test_a_log_is_read_while_it_grows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n[1]\n{"loss": 1}\n{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1, "loss": 2.0}, {"step": 2}]
    lines = [{"step": float(i), "loss": 1 / i} for i in range(1, 1001)]
    points = series_of(lines, ["loss", "none"])["loss"]
    assert len(points) <= 200 and points[-1] == (1000.0, 0.001) and points == sorted(points)
