"""Training and evaluation on the simulated device: losses and weights as on the CPU, one synchronisation a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from builders import tiny_vae
from pipelines import make_t5
from safetensors.torch import load_file
from transformers import T5EncoderModel

import lvdm.training.train
import odvae.training.train
from lvdm.cli import main
from lvdm.training.text_embeddings import TextEmbeddingCache
from lvdm.training.train import TrainConfig
from odvae.cache import LatentCache
from odvae.cache.build.builder import build_cache
from odvae.data.synthetic import write_rendered
from odvae.evaluate import Clips, measure
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.trainer.trainer import Trainer
from odvae.utils.config import load_config
from simulated_cuda.device import Synchronisations, staged_copies, synchronisations
from simulated_cuda.support import ComponentDevices, assert_close, assert_within, forget_device, on_cpu

LOOP = ("loop.steps=2", "loop.micro_batch_size=2", "loop.evaluate_every=2", "loop.save_every=9", "loop.log_every=1",
        "loop.optimizer.warmup=1")
VAE = ("data.height=16", "data.width=16", "data.frames=5", "data.held_out=2", "model.block_out_channels=[8,8,8]",
       "model.layers_per_block=1", "model.norm_num_groups=4", "model.patch_size=2")
LVDM = ("windows.held_out=2", "model.hidden_size=24", "model.num_layers=2", "model.num_attention_heads=2",
        "sample.count=1", "sample.steps=2")
CHECKPOINTED = "loop.gradient_checkpointing=full"
CRITIC = ("loss.adversarial.weight=0.5", "loss.adversarial.critic.width=4", "loss.adversarial.critic.layers=1")


@cache
def clips(scratch: Path) -> Path:
    """Four rendered clips, a tiny VAE and their cache."""
    folder = scratch.parent / "data"
    write_rendered(folder / "clips", 4, frames=9, size=16, seed=5)
    vae = tiny_vae(block_out_channels=(8, 8, 8), patch_size=2)
    vae.save_pretrained(folder / "vae")
    build_cache(folder / "clips", folder / "cache", vae, sizes=[(16, 16)], frames=[9], workers=1)
    return folder


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


def compare(folder: Path, train: Callable[[Path, str], Path], tolerance: float, half: bool = True) -> None:
    """Train on the CPU, and on the device in float32 and bfloat16; compare what was logged, and the weights."""
    with on_cpu():
        expected = train(folder / "cpu", "no")
    for precision in ("no", "bf16") if half else ("no",):
        forget_device()
        # The peak rate is not measured: a GPU's product takes a CPU seconds.
        with counted_steps() as steps, patch("odvae.trainer.throughput.matmul_rate", return_value=1e12):
            actual = train(folder / precision, precision)
        assert len(steps) == 2
        assert_within(1, steps[1], f"a step of the training {folder.name} in {precision}")
        within = tolerance if precision == "no" else 0.1
        torch.testing.assert_close(logged(folder / precision), logged(folder / "cpu"), rtol=within, atol=within)
        for file in sorted(expected.rglob("*.safetensors")):
            stored, other = load_file(file), load_file(actual / file.relative_to(expected))
            for key, value in stored.items():
                assert_close(other[key], value, tolerance if precision == "no" else 0.05)


def vae_training(scratch: Path) -> None:
    """With a critic, accumulation and gradient checkpointing; and with Muon."""
    for name, options in {"critic": (*CRITIC, "loop.gradient_accumulation_steps=2"),
                          "muon": ("loop.optimizer.name=muon", CHECKPOINTED)}.items():

        def train(output: Path, precision: str, options: tuple[str, ...] = options) -> Path:
            config = load_config(odvae.training.train.TrainConfig, None, [
                f"output={output}", f"data.folder={clips(scratch) / 'clips'}", *VAE, *LOOP, *options,
                f"loop.mixed_precision={precision}"])
            return odvae.training.train.train(config)

        # Muon computes in bfloat16 on an accelerator.
        compare(scratch / name, train, 1e-4 if name == "critic" else 2e-2, half=name == "critic")


def lvdm_training(scratch: Path) -> None:
    """Text; accumulation and gradient checkpointing; then a LoRA on what was trained."""
    data = clips(scratch)

    def train(output: Path, precision: str, *options: str) -> Path:
        config = load_config(TrainConfig, None, [
            f"output={output}", f"windows.cache={data / 'cache'}", f"vae={data / 'vae'}", *LVDM, *LOOP,
            "loop.gradient_accumulation_steps=2", *options, f"loop.mixed_precision={precision}"])
        return lvdm.training.train.train(config)

    compare(scratch / "full", lambda output, precision: train(output, precision, CHECKPOINTED),
            1e-4)
    base = scratch / "full" / "cpu" / "pipeline"
    compare(scratch / "lora", lambda output, precision: train(
        output, precision, "model.lora.rank=2", f"model.init_from={base}"), 1e-4, half=False)


def captions(scratch: Path) -> None:
    """`lvdm embed` and a training's first look at its captions let the text encoder compute on the device."""
    cached, encoder, text = clips(scratch) / "cache", scratch / "encoder", make_t5()
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
    data = clips(scratch)
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


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (vae_training, lvdm_training, captions, evaluation)}
