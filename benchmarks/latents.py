"""What do compact latents save? The same transformer, clips and budget on an image VAE's latents of every frame and on
the OD-VAE's (the paper, 2409.01199, has 2.07 times the speed at .41 of the memory).

    python benchmarks/latents.py cost [PRESET] [SIDE] [BATCH]     a training step at 81 frames: tokens, seconds, memory
    python benchmarks/latents.py quality [MINUTES] [CLIPS]        equal time on rendered clips: what was learned by then
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, record, table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lvdm.evaluation.scenes import scene_accuracy, scene_prompts
from lvdm.flow import interpolate, timesteps_schedule, velocity
from lvdm.model.transformer import LVDMTransformer3DModel
from lvdm.text import WordHashEncoder
from odvae.data.synthetic import render, sample_scene
from odvae.data.transforms import to_tensor, to_uint8
from odvae.inference.adapters import AutoencoderAdapter, load_autoencoder
from odvae.metrics.efficientnet import load_efficientnet
from odvae.metrics.frechet import FrechetFeatures, Gaussian, frechet_distance
from odvae.trainer.optim import OptimizerConfig, make_optimizers, set_learning_rate
from odvae.utils.live_memory import LiveMemory
from odvae.utils.progress import bar
from odvae.weights import DEMO_IMAGE_VAE, DEMO_VAE

FRAMES = 81
KINDS = {"image VAE, every frame": FRAMES, "OD-VAE": 1 + (FRAMES - 1) // 4}  # latent frames of a clip
VAES = {"image VAE, every frame": DEMO_IMAGE_VAE, "OD-VAE": DEMO_VAE}
TEXT_TOKENS = 16
SAMPLED = 48  # videos


def training_step(model: LVDMTransformer3DModel, optimizers: list[torch.optim.Optimizer], x0: Tensor, text: Tensor,
                  mask: Tensor | None = None) -> Tensor:
    """Train with full attention over the whole clip and one noise level per clip, the standard way, for both."""
    b, _, frames = x0.shape[:3]
    t = torch.sigmoid(torch.randn(b, 1)).expand(b, frames)
    noise = torch.randn_like(x0)
    predicted = model(interpolate(x0, noise, t), t, text, mask, groups=(frames,)).sample
    loss = (predicted - velocity(x0, noise)).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def cost(preset: str = "5m", side: str = "128", batch: str = "2") -> None:
    b, latent = int(batch), int(side) // 8

    def make() -> tuple[LVDMTransformer3DModel, list[torch.optim.Optimizer]]:
        model = LVDMTransformer3DModel.from_preset(preset, text_dim=256)
        return model, make_optimizers(model, OptimizerConfig(), non_muon_pattern="")

    def inputs(frames: int) -> tuple[Tensor, Tensor]:
        return torch.randn(b, 4, frames, latent, latent), torch.randn(b, TEXT_TOKENS, 256)

    def peak(frames: int) -> float:
        """Return GiB of live tensors at the peak of a second step, with weights, gradients and optimizer."""
        with FakeTensorMode(), LiveMemory() as memory:
            model, optimizers = make()
            x0, text = inputs(frames)
            for _ in range(2):
                training_step(model, optimizers, x0, text)
            return memory.peak / 2**30

    model, optimizers = make()
    batches = {name: inputs(frames) for name, frames in KINDS.items()}
    times = interleaved({name: lambda x=x: training_step(model, optimizers, *x) for name, x in batches.items()})
    memory = {name: peak(frames) for name, frames in KINDS.items()}
    first = next(iter(KINDS))
    rows = [[name, frames * (latent // 2) ** 2, times[name], times[first] / times[name], memory[name],
             memory[name] / memory[first]] for name, frames in KINDS.items()]
    headers = ["latents", "tokens a clip", "s a step", "x the speed", "GiB", "of the memory"]
    table(headers, rows)
    record("latents: cost of a training step", {"preset": preset, "side": side, "batch": b, "frames": FRAMES},
           [dict(zip(headers, row, strict=True)) for row in rows])


@dataclass
class Encoded:
    """Clips as one VAE's latents, normalised by their own mean and standard deviation per channel."""

    vae: AutoencoderAdapter
    latents: Tensor  # (clips, c, t, h, w)
    mean: Tensor
    std: Tensor

    def decode(self, latents: Tensor) -> np.ndarray:
        """(c, t, h, w) -> uint8 (T, H, W, 3)."""
        raw = latents[None] * self.std + self.mean
        raw = raw[0].transpose(0, 1) if self.vae.is_image_model else raw
        size = latents.shape[2] * self.vae.spatial_compression
        return to_uint8(self.vae.decode(raw, FRAMES, size, size)[0])


def encoded(source: Path, videos: np.ndarray) -> Encoded:
    vae = load_autoencoder(str(source), torch.float32)
    made = []
    with bar(len(videos), f"encode by {source.name}", "clip") as progress:
        for video in videos:
            raw = vae.encode(to_tensor(video)[None])
            made.append(raw.transpose(0, 1) if vae.is_image_model else raw[0])
            progress.update(1)
    latents = torch.stack(made)
    mean, std = (statistic((0, 2, 3, 4), keepdim=True) for statistic in (latents.mean, latents.std))
    return Encoded(vae, (latents - mean) / std, mean, std)


def quality(minutes: str = "10", clips: str = "1000") -> None:
    scenes = [sample_scene(seed) for seed in range(int(clips))]
    videos = np.stack([render(scene, FRAMES) for scene in scenes])
    text, mask = WordHashEncoder().encode([scene.caption for scene in scenes])
    real = gaussian(np.stack([render(sample_scene(10**6 + seed), FRAMES) for seed in range(SAMPLED)]))
    rows = []
    for name, source in VAES.items():
        data = encoded(source, videos)
        model, steps, losses = _trained(data, text, mask, 60 * float(minutes))
        made = _sampled(model, data)
        accuracy = scene_accuracy(made, scene_prompts(len(made)))
        distance = frechet_distance(gaussian(made), real)
        rows.append([name, steps, statistics.mean(losses[-50:]), accuracy.colour, accuracy.direction,
                     accuracy.background, distance])
    headers = ["latents", "steps", "loss", "colour", "direction", "background", "Frechet distance"]
    table(headers, rows)
    record("latents: quality at equal time", {"minutes": minutes, "clips": clips, "frames": FRAMES},
           [dict(zip(headers, row, strict=True)) for row in rows])


@torch.inference_mode()
def gaussian(videos: np.ndarray) -> Gaussian:
    """Return the features of uint8 (N, T, H, W, 3) as one Gaussian."""
    features = FrechetFeatures(load_efficientnet())
    made = Gaussian(features.dim)
    for video in videos:
        made.update(features(to_tensor(video)[None]))
    return made


def _trained(data: Encoded, text: Tensor, mask: Tensor, seconds: float,
             batch: int = 8) -> tuple[LVDMTransformer3DModel, int, list[float]]:
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(in_channels=data.latents.shape[1], hidden_size=128, num_layers=6,
                                   num_attention_heads=4, text_dim=text.shape[2])
    settings = OptimizerConfig(name="muon", learning_rate=2e-3)
    optimizers = make_optimizers(model, settings, non_muon_pattern=r"embed|adaln|modulation|norm|project_out")
    losses: list[float] = []
    began = time.monotonic()
    with bar(None, "train", "step") as progress:
        while (spent := time.monotonic() - began) < seconds:
            # The schedule is a function of the time, so that both end on a learning rate of nothing.
            set_learning_rate(optimizers, settings.learning_rate * min(1.0, 20 * spent / seconds + 0.01) *
                              0.5 * (1 + np.cos(np.pi * spent / seconds)))
            chosen = torch.randint(len(data.latents), (batch,))
            losses.append(float(training_step(model, optimizers, data.latents[chosen], text[chosen], mask[chosen])))
            progress.update(1)
    return model.eval(), len(losses), losses


@torch.inference_mode()
def _sampled(model: LVDMTransformer3DModel, data: Encoded, count: int = SAMPLED, steps: int = 20,
             guidance: float = 3.0) -> np.ndarray:
    """Sample videos of `count` scene prompts, the whole clip at once."""
    encoder, made = WordHashEncoder(), []
    null, null_mask = encoder.encode([""])
    times = timesteps_schedule(steps)
    with bar(count, "sample", "video") as progress:
        for prompt, *_ in scene_prompts(count):
            text, mask = encoder.encode([prompt])
            x = torch.randn(1, *data.latents.shape[1:], generator=torch.Generator().manual_seed(len(made)))
            for t, after in itertools.pairwise(times):
                at = t.expand(1, x.shape[2])
                cond, without = (model(x, at, *given, groups=(x.shape[2],)).sample for given in
                                 ((text, mask), (null, null_mask)))
                x = x + (after - t) * torch.lerp(without, cond, guidance)
            made.append(data.decode(x[0]))
            progress.update(1)
    return np.stack(made)


PARTS: dict[str, Any] = {"cost": cost, "quality": quality}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
