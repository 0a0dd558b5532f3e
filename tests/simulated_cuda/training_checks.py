"""Training and evaluation on the simulated device: losses and weights as on the CPU, one synchronisation a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from builders import tiny_vae
from pipelines import make_t5
from safetensors.torch import load_file
from transformers import T5EncoderModel

import lvdm.evaluation.measure
import lvdm.training.train
import odvae.cli
import odvae.training.train
from lvdm import LVDMPipeline
from lvdm.cli import main
from lvdm.evaluation.measure import EvalConfig, EvalResult
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.sampling.params import GenerationParams
from lvdm.text import WordHashEncoder
from lvdm.training.text_embeddings import TextEmbeddingCache
from lvdm.training.train import TrainConfig
from lvdm.training.windows import WindowConfig
from odvae.cache import LatentCache
from odvae.cache.encoder import LatentEncoder
from odvae.data.synthetic import write_rendered
from odvae.data.transforms import to_tensor
from odvae.data.video.reader import read_clip
from odvae.evaluate import Clips, measure
from odvae.inference.loading import load_vae
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.trainer.trainer import Trainer
from odvae.training.train import latent_statistics
from odvae.utils.config import load_config
from odvae.utils.precision_names import Computed
from simulated_cuda.device import Synchronisations, staged_copies, synchronisations
from simulated_cuda.support import ComponentDevices, assert_close, assert_within, forget_device, on_cpu

LOOP = ("loop.steps=2", "loop.micro_batch_size=2", "loop.evaluate_every=2", "loop.save_every=9", "loop.log_every=1",
        "loop.optimizer.warmup=1")
VAE = ("data.height=16", "data.width=16", "data.frames=3", "data.held_out=2", "model.block_out_channels=[8,8]",
       "model.time_compression=2", "model.layers_per_block=1", "model.norm_num_groups=4", "model.patch_size=2")
LVDM = ("windows.held_out=2", "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2",
        "sample.count=1", "sample.steps=1")
CHECKPOINTED = "loop.gradient_checkpointing=full"
CRITIC = ("loss.adversarial.weight=0.5", "loss.adversarial.critic.width=4", "loss.adversarial.critic.layers=1")


@cache
def make_data(folder: Path) -> Path:
    """Four rendered clips, a tiny VAE, and their cache, which the device builds."""
    write_rendered(folder / "clips", 4, frames=9, size=16, seed=5)
    tiny_vae(block_out_channels=(8, 8, 8), patch_size=2).save_pretrained(folder / "vae")
    forget_device()
    with ComponentDevices((AutoencoderKLODVAE, "encode_chunk"), (AutoencoderKLODVAE, "decode_chunk")) as seen:
        assert odvae.cli.main([
            "cache", "build", str(folder / "clips"), str(folder / "cache"), "--vae", str(folder / "vae"), "--size",
            "16", "16", "--frames", "9", "--workers", "1", "--dtype", "float32", "--store-dtype", "float32"]) == 0
    assert not seen.devices or seen.devices == {"AutoencoderKLODVAE": {"cuda"}}, dict(seen.devices)
    return folder


def data_of(scratch: Path) -> Path:
    return make_data(scratch.parent / "data")


def cache_build(scratch: Path) -> None:
    """`odvae cache build` encodes on the device, to what the CPU encodes."""
    data = data_of(scratch)
    stored = LatentCache(data / "cache")
    with on_cpu():
        encoder = LatentEncoder(AutoencoderKLODVAE.from_pretrained(data / "vae").eval())
        expected = [encoder.encode(to_tensor(read_clip(path, 0.0, 9, 8.0))[None])[0]
                    for path in sorted((data / "clips").rglob("*.mp4"))]
    found = [stored.entry(i) for i in range(len(stored))]
    assert len(found) == len(expected) == 4
    for latent in found:
        assert min(float((latent - other).abs().max()) for other in expected) < 1e-4


@contextmanager
def counted_steps() -> Iterator[list[Synchronisations]]:
    """Count the synchronisations of each training step, whose batches must be in pinned memory."""
    steps, train_step = [], Trainer.train_step

    def counted(*arguments: Any) -> bool:
        with synchronisations() as seen, staged_copies() as staged:
            stopping = train_step(*arguments)
        assert not [place for place, _ in staged if "/training/" in place], staged
        steps.append(seen)
        return stopping

    with patch.object(Trainer, "train_step", counted):
        yield steps


def logged(run: Path) -> torch.Tensor:
    """What training and evaluation logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([value for line in lines for _, value in sorted(line.items())])


def compare(folder: Path, train: Callable[[Path, str], Path], precision: str) -> None:
    """Train on the CPU, and on the device in a precision; compare what was logged, and the weights."""
    with on_cpu():
        expected = train(folder / "cpu", "no")
    forget_device()
    # The peak rate is not measured: a GPU's product takes a CPU seconds.
    with counted_steps() as steps, patch("odvae.trainer.throughput.matmul_rate", return_value=1e12):
        actual = train(folder / precision, precision)
    assert len(steps) == 2
    assert_within(1, steps[1], f"a step of the training {folder.name} in {precision}")
    within, near = (1e-4, 1e-4) if precision == "no" else (0.1, 0.05)
    torch.testing.assert_close(logged(folder / precision), logged(folder / "cpu"), rtol=within, atol=within)
    for file in sorted(expected.rglob("*.safetensors")):
        stored, other = load_file(file), load_file(actual / file.relative_to(expected))
        for key, value in stored.items():
            assert_close(other[key], value, near)


def vae_training(scratch: Path) -> None:
    """With a critic and accumulation in float32; with Muon and gradient checkpointing too in bfloat16."""
    data = data_of(scratch)
    for precision, options in {"no": (*CRITIC, "loop.gradient_accumulation_steps=2"),
                               "bf16": (*CRITIC, "loop.optimizer.name=muon", CHECKPOINTED)}.items():

        def train(output: Path, precision: str, options: tuple[str, ...] = options) -> Path:
            config = load_config(odvae.training.train.TrainConfig, None, [
                f"output={output}", f"data.folder={data / 'clips'}", *VAE, *LOOP, *options,
                f"loop.mixed_precision={precision}"])
            with patch("odvae.training.train.latent_statistics", partial(latent_statistics, batches=1)), \
                    patch("odvae.training.train.draw_curves"):
                return odvae.training.train.train(config)

        compare(scratch / f"in_{precision}", train, precision)


def lvdm_training(scratch: Path) -> None:
    """Text; accumulation and gradient checkpointing in float32; then a LoRA on what was trained, in bfloat16."""
    data = data_of(scratch)

    def train(output: Path, precision: str, *options: str) -> Path:
        config = load_config(TrainConfig, None, [
            f"output={output}", f"windows.cache={data / 'cache'}", f"vae={data / 'vae'}", *LVDM, *LOOP,
            "loop.gradient_accumulation_steps=2", *options, f"loop.mixed_precision={precision}"])
        with patch("lvdm.training.train._plot_losses"):
            return lvdm.training.train.train(config)

    compare(scratch / "full", lambda output, precision: train(output, precision, CHECKPOINTED), "no")
    base = scratch / "full" / "cpu" / "pipeline"
    compare(scratch / "lora", lambda output, precision: train(
        output, precision, "model.lora.rank=2", f"model.init_from={base}"), "bf16")


def captions(scratch: Path) -> None:
    """`lvdm embed` and a training's first look at its captions let the text encoder compute on the device."""
    cached, encoder, text = data_of(scratch) / "cache", scratch / "encoder", make_t5()
    text.model.save_pretrained(encoder)
    text.tokenizer.save_pretrained(encoder)
    with ComponentDevices((T5EncoderModel, "forward")) as seen:
        assert main(["embed", str(cached), "--text-encoder", str(encoder)]) == 0
        assert seen.devices == {"T5EncoderModel": {"cuda"}}
        seen.devices.clear()
        other = make_t5(24)
        vectors, _ = TextEmbeddingCache(other, [LatentCache(cached)])([""])
        assert seen.devices == {"T5EncoderModel": {"cuda"}}
    assert vectors.device.type == other.model.device.type == "cpu"


def evaluation(scratch: Path) -> None:
    """The evaluation of a VAE measures on the device what it measures on the CPU."""
    data = data_of(scratch)
    files = tuple(sorted((data / "clips").rglob("*.mp4")))[:2]

    def results() -> Any:
        return measure(str(data / "vae"), "tiny", Clips(files, 9, None, (16, 16)), "float32", None, None,
                       scratch / "first.npy")

    with on_cpu():
        expected = results()
    forget_device()
    assert AutoencoderKLODVAE.from_pretrained(data / "vae").device.type == "cpu"
    actual = results()
    assert actual.keys() == expected.keys()
    for name in ("psnr", "ssim"):
        assert abs(actual[name] - expected[name]) < 1e-3, name


def lvdm_evaluation(scratch: Path) -> None:
    """`lvdm evaluate` measures on the device, in float32, what it measures on the CPU, and in bfloat16 too."""
    data, folder = data_of(scratch), scratch / "pipeline"
    torch.manual_seed(0)
    transformer = LVDMTransformer3DModel(in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=2,
                                         text_dim=16, sample_height=16, sample_width=16)
    LVDMPipeline.build(load_vae(data / "vae"), transformer, WordHashEncoder(dim=16)).save_pretrained(folder)

    def result(precision: Computed) -> EvalResult:
        return lvdm.evaluation.measure.measure(str(folder), "tiny", EvalConfig(
            (9,), 1, 1, GenerationParams(num_inference_steps=1, guidance_scale=2.0), cache=data / "cache",
            precision=precision))

    held_out = partial(WindowConfig, held_out=2)
    with patch("lvdm.evaluation.measure.WindowConfig", held_out):
        with on_cpu():
            expected = result("float32")
        forget_device()
        with ComponentDevices((LVDMTransformer3DModel, "forward"), (AutoencoderKLODVAE, "decode_chunk")) as seen:
            actual, half = result("float32"), result("bfloat16")
    assert seen.devices["LVDMTransformer3DModel"] == seen.devices["AutoencoderKLODVAE"] == {"cuda"}
    for name, loss in expected.figures["loss"].items():
        assert abs(actual.figures["loss"][name] - loss) < 1e-4 and abs(half.figures["loss"][name] - loss) < 0.1, name
    pictures, near, rough = (each.rows[0, 9].pictures.astype(int) for each in (expected, actual, half))
    assert abs(near - pictures).max() <= 1 and abs(rough - pictures).mean() < 4


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (cache_build, vae_training, lvdm_training, captions, evaluation,
                                        lvdm_evaluation)}
