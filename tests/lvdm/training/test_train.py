"""Training an LVDM: resumed = uninterrupted bit for bit, a golden loss curve, and the commands around it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lvdm.cli import main
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.pipeline import LVDMPipeline
from lvdm.training.lora import LoraConfig, add_lora
from lvdm.training.objective import QUANTILES, held_out_passes
from lvdm.training.train import TrainConfig, train
from lvdm.training.windows import LatentWindows
from odvae import AutoencoderKLODVAE
from odvae.trainer.optim import learning_rate
from odvae.utils.config import load_config, save_config
from odvae.utils.errors import UserError

TINY = ["windows.held_out=2", "model.hidden_size=24", "model.num_layers=2", "model.num_attention_heads=2",
        "sample.count=1", "sample.steps=2", "loop.micro_batch_size=4", "loop.optimizer.name=muon",
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
    settings = ["loop.steps=5", "loop.save_every=2", "loop.log_every=2", "loop.evaluate_every=2"]
    train(config(tmp_path / "whole", *settings))
    cut, batch = config(tmp_path / "cut", *settings), LatentWindows.batch

    def stop_at_step_3(self, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentWindows, "batch", stop_at_step_3)
        train(cut)
    assert not (tmp_path / "cut/pipeline").exists()
    train(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000005")  # killed after step 4
    shutil.rmtree(tmp_path / "cut/pipeline")
    train(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def assert_same_run(one: Path, other: Path) -> None:
    a, b = weights(one, 5), weights(other, 5)
    assert a.keys() == b.keys() and any(k.startswith("optimizer1") for k in a)
    assert all(a[k].equal(b[k]) for k in a)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (one / file).read_bytes() == (other / file).read_bytes()


def test_golden_loss_curve(config, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config(tmp_path, "loop.steps=20", "loop.log_every=5", "loop.evaluate_every=100", "sample.count=0"))
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = [0.99450, 0.97906, 0.90405, 0.84157]


def test_train_then_generate_by_the_commands(cache, vae_folder, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *TINY, f"windows.cache={cache}", f"vae={vae_folder}", f"output={run}", "loop.steps=2",
                 "loop.evaluate_every=1", "save_dtype=float16"]) == 0
    assert (run / "loss.png").is_file() and len(list((run / "samples").glob("*.png"))) == 3  # before, 1, 2
    assert (
        main(
            [
                "generate",
                "a red circle",
                "--pipeline",
                str(run / "pipeline"),
                "--num-frames",
                "9",
                "--num-inference-steps",
                "2",
                "--out",
                str(tmp_path / "made"),
                "--scale",
                "2",
            ]
        )
        == 0
    )
    from odvae.data.video.reader import probe

    (video,) = (tmp_path / "made").glob("*.mp4")
    info = probe(video)
    assert (info.frames, info.height, info.width, round(info.frame_rate)) == (9, 64, 64, 8)
    assert (
        main(
            [
                "generate",
                "and on",
                "--pipeline",
                str(run / "pipeline"),
                "--num-frames",
                "17",
                "--num-inference-steps",
                "1",
                "--video",
                str(video),
                "--out",
                str(tmp_path / "longer"),
            ]
        )
        == 0
    )
    assert probe(tmp_path / "longer/00-and-on.mp4").frames == 17
    again = LVDMPipeline.from_pretrained(run / "pipeline")
    assert again.transformer.dtype == torch.float32


def test_a_class_conditional_model_is_prompted_by_class_name(config, cache, tmp_path):
    train(config(tmp_path, "condition=class", "loop.steps=4", "loop.optimizer.learning_rate=0.05"))
    pipeline = LVDMPipeline.from_pretrained(tmp_path / "pipeline")
    names = pipeline.transformer.config.class_names
    assert len(names) > 2 and pipeline.text_encoder is None and pipeline.transformer.config.text_dim == 0
    one, other = (pipeline(name, num_frames=5, num_inference_steps=2, seed=0).frames for name in names[:2])
    assert (one != other).any()
    with pytest.raises(UserError, match=r"is not one of the .* classes"):
        pipeline("a red herring", num_frames=5, num_inference_steps=1)


def test_an_unconditional_model(config, tmp_path):
    train(config(tmp_path, "condition=none", "loop.steps=1"))
    pipeline = LVDMPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline("", num_frames=5, num_inference_steps=1).frames.shape == (1, 5, 32, 32, 3)


def test_held_out_loss_by_timestep(config, tmp_path):
    """An untrained model predicts 0, so that its loss is the mean of (e - x_0)^2 at every timestep."""
    train(config(tmp_path, "loop.steps=1", "loop.optimizer.learning_rate=1e-12", "sample.count=0"))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    by_timestep = [first[f"loss_heldout_t{q}"] for q in (10, 30, 50, 70, 90)]
    assert by_timestep == pytest.approx([by_timestep[0]] * 5, rel=1e-5)
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 for line in speed)


def test_a_quantile_of_the_timesteps_is_evaluated_on_eight_clips():
    counts = [8, 8, 3, 1]
    assert len(held_out_passes([1] * 64, 64)) == 64 + 5 * 8  # not 6 * 64
    assert held_out_passes(counts, 4) == [(i, None) for i in range(4)] + [(0, q) for q in QUANTILES]
    assert held_out_passes([1, 2, 1, 1], 2) == [(0, None), (2, None)] + [(i, q) for q in QUANTILES for i in (0, 2)]


def test_training_a_lora(config, tmp_path):
    pytest.importorskip("peft")
    base = tmp_path / "base"
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=2)
    torch.nn.init.normal_(model.project_out.weight, std=0.2)  # zero initially
    model.save_pretrained(base)
    tuned = train(config(tmp_path / "tuned", f"model.init_from={base}", "model.lora={rank: 2}", "loop.steps=2",
                         "loop.optimizer.learning_rate=0.05", "loop.optimizer.warmup=0", "sample.count=0"))
    saved = load_file(tmp_path / "tuned/checkpoints/step-00000002/model.safetensors")
    assert saved and all("lora" in name for name in saved)  # the base is not in it

    def predict(transformer: LVDMTransformer3DModel) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return transformer(torch.randn(1, 4, 3, 4, 4, generator=g), torch.full((1, 3), 0.5),
                               torch.randn(1, 2, 256, generator=g)).sample

    merged = LVDMTransformer3DModel.from_pretrained(tuned / "transformer")
    plain = LVDMTransformer3DModel.from_pretrained(base)
    before = predict(plain)
    pipeline = LVDMPipeline.from_pretrained(tuned)  # the default call, as for any pipeline of diffusers
    pipeline.transformer = plain
    pipeline.load_lora_weights(tmp_path / "tuned/lora")
    assert (predict(plain) - before).abs().max() > 1e-4
    torch.testing.assert_close(predict(merged), predict(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text_dim", [0, 8])
def test_a_lora_adapts_every_layer_of_every_block(text_dim):
    pytest.importorskip("peft")
    model = LVDMTransformer3DModel(hidden_size=24, num_layers=2, num_attention_heads=2, text_dim=text_dim)
    add_lora(model, LoraConfig(rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (10 if text_dim else 6)  # two matrices per layer, in two blocks
    assert all(name.startswith("blocks.") and "lora" in name for name in trained)
    with pytest.raises(UserError, match="there is no layer sideways"):
        add_lora(model, LoraConfig(targets=("sideways",)))


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "model.hiden_size=3"], "did you mean 'model.hidden_size'"),
    (["train", "windows.cache={empty}", "vae={vae}"], "is not a latent cache"),
    (["train", "windows.cache={cache}", "vae={other}"], "another VAE"),
    (["train", "windows.cache={cache}"], "pass vae= with the folder"),  # none of the shipped VAEs made it
    (["train", "windows.cache={cache}", "vae={vae}", "windows.frames=13"], "the nearest are 9 and 17"),
    (["train", "windows.cache={cache}", "vae={empty}"], "is not a VAE's folder"),
    (["train", "windows.cache={cache}", "vae={vae}", "model.init_from={wide}"], "text_dim: 8 there, 256 here"),
    (["train", "windows.cache={cache}", "vae={vae}", "model.lora={{rank: 2}}"], "give their folder as model.init_from"),
    (["train", "windows.cache={cache}", "vae={vae}", "model.preset=huge"], "choose from 5m, 30m"),
    (["train", "windows.cache={cache}", "vae={vae}", "model.attention=fast"], "model.attention=fast"),
    (["train", "windows.cache={cache}", "vae={vae}", "condition=none", "sample.prompts=[x]"], "takes no prompts"),
    (["generate", "x", "--pipeline", "{empty}"], "is not a pipeline's folder"),
])
def test_user_errors_have_no_traceback(arguments, message, cache, vae_folder, tmp_path, capsys):
    other = tmp_path / "other"
    torch.manual_seed(1)  # the other VAE has seed 0
    AutoencoderKLODVAE(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
                       patch_size=2).save_pretrained(other)
    empty, wide = tmp_path / "empty", tmp_path / "wide"
    empty.mkdir()
    LVDMTransformer3DModel(hidden_size=32, num_layers=1, num_attention_heads=2, text_dim=8).save_pretrained(wide)
    filled = [a.format(cache=cache, vae=vae_folder, empty=empty, other=other, wide=wide) for a in arguments]
    if filled[0] == "train":
        filled.append(f"output={tmp_path / 'run'}")
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_run_is_resumed_only_with_the_same_config(config, tmp_path, caplog, capsys):
    run = ["loop.steps=3", "loop.save_every=2", "loop.evaluate_every=9", "sample.count=0", "loop.log_every=1"]
    train(config(tmp_path, *run))
    with pytest.raises(UserError, match=r"config \(flow\.mean: 0\.0 there, 1\.0 here, loop\.seed: 0 there, 5 here\)"):
        train(config(tmp_path, *run, "loop.seed=5", "flow.mean=1"))
    longer = [*run, "loop.steps=4"]
    with pytest.raises(UserError, match=r"loop\.steps: 3 there, 4 here.*part of what is learned.*--change-schedule"):
        train(config(tmp_path, *longer))
    with pytest.raises(UserError, match=r"loop\.seed: 0 there, 5 here"):
        train(config(tmp_path, *longer, "loop.seed=5"), change_schedule=True)
    with pytest.raises(UserError, match=r"3 steps already, but loop\.steps is 2; give at least 3"):
        train(config(tmp_path, *run, "loop.steps=2"), change_schedule=True)
    saved = config(tmp_path, *longer)
    path = tmp_path / "longer.yaml"
    save_config(saved, path)
    assert main(["train", str(path)]) == 2 and "--change-schedule" in capsys.readouterr().err
    assert main(["train", str(path), "--change-schedule"]) == 0
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
             if "lr" in line}
    for step in range(1, 5):  # earlier steps keep the rate of their schedule
        assert lines[step]["lr"] == learning_rate(step - 1, 3 if step <= 3 else 4, saved.loop.optimizer)
    assert load_config(TrainConfig, tmp_path / "config.yaml").loop.steps == 4


def test_settings_that_do_not_affect_learning_may_change(config, tmp_path, monkeypatch):
    settings = ["loop.steps=3", "loop.save_every=3", "loop.log_every=1", "sample.count=0"]
    train(config(tmp_path / "whole", *settings))
    batch = LatentWindows.batch

    def stop_at_step_1(self, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentWindows, "batch", stop_at_step_1)
        train(config(tmp_path / "cut", *settings))
    (tmp_path / "cut").rename(tmp_path / "moved")
    train(
        config(
            tmp_path / "moved",
            *settings,
            "loop.save_every=1",
            "loop.keep=9",
            "loop.log_every=2",
            "loop.evaluate_every=2",
            "loop.keep_best=loss_heldout",
            "loop.best_is=lowest",
            "loop.trackers=[tensorboard]",
            "loop.stop_after_skipped=2",
            "loop.micro_batch_size=2",
            "loop.gradient_accumulation_steps=2",
            "loop.gradient_checkpointing=full",
            "sample.count=1",
            "sample.steps=1",
            "save_dtype=float16",
            "model.attention=native",
        )
    )
    one, other = weights(tmp_path / "whole", 3), weights(tmp_path / "moved", 3)
    for key, value in one.items():  # two micro-batches round differently than one
        torch.testing.assert_close(other[key], value, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "moved/samples/step-000003.png").exists() and list((tmp_path / "moved/trackers").iterdir())


def test_an_evaluation_that_is_not_finite_is_logged_and_never_the_best(config, tmp_path, monkeypatch, caplog):
    losses = iter([1.0, math.nan, 0.5, math.nan, math.nan, math.nan])
    monkeypatch.setattr("lvdm.training.train.held_out_losses", lambda *args: {"loss_heldout": next(losses)})
    call = LVDMPipeline.__call__

    def wrong(self, *args, **options):
        self.transformer.project_out.bias.data.fill_(math.nan)
        try:
            return call(self, *args, **options)
        finally:
            self.transformer.project_out.bias.data.zero_()

    monkeypatch.setattr(LVDMPipeline, "__call__", wrong)
    train(config(tmp_path, "loop.steps=4", "loop.evaluate_every=1", "loop.save_every=4", "loop.keep=1",
                 "sample.steps=1", "loop.keep_best=loss_heldout", "loop.best_is=lowest"))
    assert "the evaluation at step 1 is not finite: loss_heldout" in caplog.text
    assert "no samples at step 4: the transformer gave NaN" in caplog.text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
