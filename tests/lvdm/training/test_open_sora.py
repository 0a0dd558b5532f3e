"""Training Open-Sora-Plan's transformer: the loss in closed form, resumed = uninterrupted, and what it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from pipelines import make_t5
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from app.tasks.export_checkpoint import export
from lvdm.cli import main
from lvdm.condition import Condition
from lvdm.model.open_sora import OpenSoraT2VTransformer3DModel
from lvdm.sampling.open_sora import OpenSoraPipeline
from lvdm.training.lora import LoraConfig, add_lora
from lvdm.training.objective import DenoisingDiffusion, DiffusionConfig, DiffusionNoiseSampler, TrainingBatch
from lvdm.training.train import TrainConfig, set_up, train
from lvdm.training.windows import LatentWindows, Windows
from odvae.inference.loading import load_vae
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

TINY = ["windows.held_out=2", "windows.frames=9", "sample.count=0", "loop.micro_batch_size=2", "loop.log_every=2",
        "loop.optimizer.learning_rate=5e-3", "loop.optimizer.warmup=1"]


def tiny_transformer() -> OpenSoraT2VTransformer3DModel:
    torch.manual_seed(0)
    return OpenSoraT2VTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=2,
                                         caption_channels=16, sample_size=(4, 4), sample_size_t=3)


@pytest.fixture(scope="module")
def folders(vae_folder, tmp_path_factory):
    """The folders of a pipeline that predicts epsilon, and of one that predicts v."""
    encoder, root = make_t5(), tmp_path_factory.mktemp("open-sora")
    for prediction in ("epsilon", "v_prediction"):
        OpenSoraPipeline(load_vae(vae_folder), tiny_transformer(), encoder.model, encoder.tokenizer,
                         EulerAncestralDiscreteScheduler(prediction_type=prediction),
                         ).save_pretrained(root / prediction)
    return root


@pytest.fixture
def config(folders, cache):
    def make(output, *more, start="epsilon"):
        return load_config(TrainConfig, None, [f"model.init_from={folders / start}", f"windows.cache={cache}",
                                               f"output={output}", *TINY, *more])
    return make


class Half(nn.Module):
    """Predicts half of its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, text, mask):
        self.timesteps = t
        return SimpleNamespace(sample=self.weight * x)


def random_windows(count=6):
    latents = torch.randn(count, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return Windows(latents, ("red",) * count, tuple(range(count)), (0, 1, 2), 8.0, ("clip",) * count)


def no_text(captions):
    return Condition(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_in_closed_form(prediction, gamma):
    windows, t = random_windows(), np.array([0, 20, 150, 400, 800, 999])
    noise = torch.randn(windows.latents.shape, generator=torch.Generator().manual_seed(2))
    batch = TrainingBatch(windows, noise, torch.from_numpy(t), no_text(windows.captions))
    scheduler = DDIMScheduler()  # its betas are those of the public training
    objective = DenoisingDiffusion(Half(), DiffusionConfig(snr_gamma=gamma), scheduler.alphas_cumprod, prediction)

    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t].reshape(-1, 1, 1, 1, 1)
    x0, e = windows.latents.double().numpy(), noise.double().numpy()
    x = np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * e
    goal = e if prediction == "epsilon" else np.sqrt(alpha) * e - np.sqrt(1 - alpha) * x0
    error, snr = ((0.5 * x - goal) ** 2).mean((1, 2, 3, 4)), (alpha / (1 - alpha)).ravel()
    weight = np.minimum(snr, gamma or np.inf) / (snr if prediction == "epsilon" else snr + 1) if gamma else 1.0
    assert objective(batch, 0, 0)["loss"].item() == pytest.approx((weight * error).mean(), rel=1e-4)
    assert objective.model.timesteps.tolist() == t.tolist()


def test_draws_are_uniform_and_depend_on_the_samples_index_alone():
    sampler = DiffusionNoiseSampler(DiffusionConfig(noise_offset=0.5), no_text, seed=3, num_timesteps=1000)
    windows = random_windows()
    one, again, other = sampler(windows, 5), sampler(windows, 5), sampler(windows, 6)
    assert one.t.equal(again.t) and one.noise.equal(again.noise) and not one.t.equal(other.t)
    half = Windows(windows.latents[3:], windows.captions[3:], (3, 4, 5), *list(vars(windows).values())[3:])
    assert sampler(half, 5).t.equal(one.t[3:]) and sampler(half, 5).noise.equal(one.noise[3:])
    t = torch.cat([sampler(windows, step).t for step in range(300)]).double()
    assert 0 <= t.min() < 20 and 980 < t.max() <= 999 and abs(t.mean() - 499.5) < 30
    assert sampler.held_out(windows, 0.3).t.tolist() == [300] * 6
    means = torch.cat([sampler(windows, step).noise.mean((2, 3, 4)) for step in range(100)])
    assert float(means.std()) == pytest.approx((0.5**2 + 1 / 12) ** 0.5, rel=0.05)  # of 12 values per channel


def test_dropped_captions_are_empty_prompts():
    seen = []
    sampler = DiffusionNoiseSampler(DiffusionConfig(condition_dropout=0.5), lambda c: seen.extend(c) or no_text(c),
                                    seed=0, num_timesteps=1000)
    for step in range(100):
        sampler(random_windows(), step)
    assert set(seen) == {"red", ""} and seen.count("") == pytest.approx(300, abs=50)


@pytest.mark.parametrize("more", [[], ["model.lora={rank: 2}", "loop.gradient_checkpointing=full",
                                       "loop.gradient_accumulation_steps=2", "loop.optimizer.name=muon"]])
def test_resumed_is_uninterrupted_bit_for_bit(config, tmp_path, monkeypatch, more):
    settings = ["loop.steps=4", "loop.save_every=2", "loop.evaluate_every=2", *more]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config(whole, *settings))
    batch = LatentWindows.batch

    def stop_at_step_2(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentWindows, "batch", stop_at_step_2)
        train(config(cut, *settings))
    assert not (cut / "pipeline").exists()
    train(config(cut, *settings))
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    for file in ("pipeline/transformer/diffusion_pytorch_model.safetensors",
                 "checkpoints/step-00000004/model.safetensors", "checkpoints/step-00000004/ema.safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()
    shutil.rmtree(cut / "pipeline")
    exported = export(cut)  # as the app does with a stopped run
    weights = load_file(whole / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(exported / "transformer/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_golden_loss_curve(config, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config(tmp_path, "loop.steps=16", "loop.log_every=4", "loop.evaluate_every=100"))
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = [0.93776, 0.74717, 0.64903, 0.50717]


@pytest.mark.parametrize("start", ["epsilon", "v_prediction"])
def test_a_lora_in_the_pipeline_gives_the_trainings_own_samples(config, folders, tmp_path, monkeypatch, start):
    sheets = []
    monkeypatch.setattr("lvdm.training.train.contact_sheet", lambda videos, *_: sheets.append(videos))
    train(config(tmp_path, "model.lora={rank: 2}", "loop.steps=3", "loop.evaluate_every=9",
                 "loop.optimizer.learning_rate=0.05", "sample.prompts=[Red, blue]", "sample.count=2", "sample.steps=3",
                 "sample.guidance_scale=3", start=start))
    saved = load_file(tmp_path / "checkpoints/step-00000003/model.safetensors")
    assert saved and all("lora" in name for name in saved)  # the base is not in it
    names = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert names and all(name.startswith("transformer.transformer_blocks.") for name in names)

    call = dict(prompt=["Red", "blue"], num_frames=9, num_inference_steps=3, guidance_scale=3, seed=[0, 1],
                output_type="uint8")
    plain = OpenSoraPipeline.from_pretrained(folders / start)
    plain.load_lora_weights(tmp_path / "lora")
    for pipeline in (plain, OpenSoraPipeline.from_pretrained(tmp_path / "pipeline")):
        assert pipeline.scheduler.config.prediction_type == start
        frames = pipeline(**call).frames.astype(int)
        assert np.abs(frames - np.stack(sheets[-1])).max() <= 1
    assert np.abs(np.stack(sheets[0]).astype(int) - np.stack(sheets[-1])).max() > 3  # it has learned something


def test_named_schedulers_predict_what_the_model_does(folders):
    pipeline = OpenSoraPipeline.from_pretrained(folders / "v_prediction")
    assert pipeline.get_scheduler("dpm").config.prediction_type == "v_prediction"
    with pytest.raises(UserError, match=r"prediction_type='epsilon'; this model predicts \"v_prediction\""):
        pipeline.get_scheduler(DDIMScheduler())


@pytest.fixture
def another_precision():
    """Allow a training in another precision than those before and after."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("another_precision")
def test_train_then_generate_by_the_commands(folders, cache, tmp_path):
    run, size = tmp_path / "run", ["--num-frames", "9", "--num-inference-steps", "2"]
    assert main(["train", *TINY, f"model.init_from={folders / 'epsilon'}", f"windows.cache={cache}", f"output={run}",
                 "loop.steps=2", "model.lora={rank: 2}", "loop.mixed_precision=bf16", "sample.count=1",
                 "sample.steps=2"]) == 0
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert main(["generate", "red", "--pipeline", str(run / "pipeline"), *size, "--out", str(tmp_path / "merged")]) == 0
    assert main(["generate", "red", "--pipeline", str(folders / "epsilon"), "--lora", str(run / "lora"), *size,
                 "--out", str(tmp_path / "lora")]) == 0
    one, other = (load_file(tmp_path / name / "00-red.safetensors")["latents"].float() for name in ("merged", "lora"))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_weights_under_a_lora_are_rounded_in_training_but_not_in_what_is_saved(config, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("lvdm.training.open_sora.compute_precision", lambda *_: "bf16")
    setup = set_up(config(tmp_path, "model.lora={rank: 2}"))
    assert {p.dtype for p in setup.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    setup.save(tmp_path / "pipeline", tmp_path / "lora")  # the adapter is zero
    again = set_up(config(tmp_path, start=tmp_path / "pipeline"))  # on the same cache
    assert again.model.dtype == torch.float32
    one, other = (load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
                  for folder in (tmp_path / "pipeline", folders / "epsilon"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("more", "message"), [
    (["flow.mean=1"], "flow.mean=1.0: this model is trained by denoising diffusion, see `diffusion`"),
    (["windows.history=1"], "windows.history=1: this model denoises the whole video at once"),
    (["windows.mid_clip=0.2"], "windows.mid_clip=0.2: this model denoises the whole video"),
    (["condition=class"], "condition=class: this model is conditioned on text"),
    (["text_encoder=elsewhere"], "text_encoder=elsewhere: this model is trained with the text encoder of its pipeline"),
    (["model.group_size=3"], "model.group_size=3: the sizes are those of the trained weights"),
    (["vae={other}"], "is another VAE than that of the pipeline"),
    (["windows.frames=10"], "the nearest are 9 and 13"),
    (["model.init_from={folder}/transformer"], "holds a transformer of Open-Sora-Plan alone"),
    (["model.init_from={other}"], "holds AutoencoderKLODVAE, not LVDMTransformer3DModel"),
])
def test_what_does_not_apply_is_refused_by_name(folders, cache, tmp_path, capsys, more, message):
    from odvae.weights import NATURAL_VAE

    folder, arguments = folders / "epsilon", [one.format(other=NATURAL_VAE, folder=folders / "epsilon") for one in more]
    assert main(["train", *TINY, f"model.init_from={folder}", f"windows.cache={cache}", f"output={tmp_path / 'run'}",
                 *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_a_diffusion_setting_of_an_lvdm_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"diffusion.snr_gamma=1.0: an LVDM is trained by flow matching"):
        set_up(load_config(TrainConfig, None, ["diffusion.snr_gamma=1"]))


def test_a_lora_adapts_every_linear_layer_of_every_block_and_no_other():
    model = tiny_transformer().bfloat16()
    add_lora(model, LoraConfig(rank=2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 10  # two matrices per layer, in two blocks
    assert all(name.startswith("transformer_blocks.") and p.dtype == torch.float32 for name, p in trained.items())


def test_flops_are_those_that_torch_counts():
    model, text = tiny_transformer(), torch.zeros(2, 5, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, 4, 3, 4, 6), torch.zeros(2), text)
    assert model.flops(2, 3, 4, 6, 5) == pytest.approx(counter.get_total_flops(), rel=0.01)
