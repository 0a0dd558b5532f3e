"""What training objectives share, and denoising diffusion, by which Open-Sora-Plan is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from odvae.trainer.evaluation import EvaluationGroup, evenly
from odvae.trainer.objective import Example, Objective
from odvae.utils.config import Config
from odvae.utils.seeding import generator

from ..condition import Conditioner
from ..diffusion import PredictionType, add_noise, min_snr_weight, target
from ..model.open_sora import OpenSoraT2VTransformer3DModel
from .batch import BatchShape, TrainingBatch
from .windows import Windows

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps, at which the held-out loss is logged
QUANTILE_CLIPS = 8  # of the held-out ones, at each quantile: their losses differ less than those of the quantiles

Pass = tuple[int, float | None]  # over a batch: its index, and the quantile that its timesteps are at


class NoiseSampler:
    """Draws timesteps, dropped captions and noise, in this order. They are a pure function of (seed, step, index of the
    sample among all samples of the step), so that it does not matter how many processes share the step.

    Args:
        dropout: share of captions dropped, for guidance (2207.12598).
    """

    stream: ClassVar[str]  # names the random numbers, see `generator`

    def __init__(self, condition: Conditioner, *, seed: int, dropout: float) -> None:
        self.condition, self.seed, self.dropout = condition, seed, dropout

    def __call__(self, windows: Windows, step: int) -> TrainingBatch:
        return self._draw(windows, [generator(self.seed, self.stream, step, i) for i in windows.sample_indices],
                          self.dropout)

    def held_out(self, windows: Windows, quantile: float | None = None) -> TrainingBatch:
        """Always the same draw, without dropped captions; with `quantile` everything is at that quantile of the
        timesteps."""
        batch = self._draw(windows, [generator(0, "held out", i) for i in windows.sample_indices], 0.0)
        if quantile is None:
            return batch
        return replace(batch, t=torch.full_like(batch.t, self.quantile(windows, quantile)))

    def _draw(self, windows: Windows, rngs: Sequence[torch.Generator], dropout: float) -> TrainingBatch:
        return self._draw_at(windows, torch.stack([self.timesteps(windows, rng) for rng in rngs]), rngs, dropout)

    def _draw_at(self, windows: Windows, t: Tensor, rngs: Sequence[torch.Generator], dropout: float) -> TrainingBatch:
        """Draw the rest of a batch with these timesteps."""
        captions = ["" if float(torch.rand((), generator=rng)) < dropout else caption
                    for rng, caption in zip(rngs, windows.captions, strict=True)]
        noise = torch.stack([self.noise(windows.latents.shape[1:], rng) for rng in rngs])
        return TrainingBatch(windows, noise, t, self.condition(captions))

    def timesteps(self, windows: Windows, rng: torch.Generator) -> Tensor:
        """Draw those of a sample: (T,), or () for all of its latent frames."""
        raise NotImplementedError

    def quantile(self, windows: Windows, quantile: float) -> float:
        """Return the timestep below which that share is drawn."""
        raise NotImplementedError

    def noise(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        """Draw that of a sample, of shape (c, T, h, w)."""
        return torch.randn(tuple(shape), generator=rng)


class LatentObjective(Objective):
    """The loss of a batch; it draws no random numbers.

    Attributes:
        largest: the largest micro-batch, for estimates of memory; None: unknown.
    """

    label: ClassVar[str]  # of the loss in plots
    uses_every_parameter = True  # a window has its clip's first latent wherever it is from

    model: Any
    largest: BatchShape | None = None
    _timesteps_per_sample = True  # False: one per latent frame

    def forward(self, batch: TrainingBatch, step: int, micro_batch: int) -> dict[str, Tensor]:
        return {"loss": self.loss(batch)}

    def loss(self, batch: TrainingBatch) -> Tensor:
        """Return the mean over samples of the mean over their frames: equal micro-batches have the same mean."""
        raise NotImplementedError

    def example(self) -> TrainingBatch | None:
        return None if self.largest is None else self.largest.batch(self.model.config, self._timesteps_per_sample)

    def examples(self) -> Sequence[Example]:
        batch = self.example()
        return () if batch is None else (Example(batch, samples=len(batch.windows.latents)),)

    def tokens(self, batch: TrainingBatch) -> int:
        """Tokens of a batch in the transformer."""
        b, _, frames, height, width = batch.windows.latents.shape
        return b * frames * height * width // int(self.model.config.patch_size) ** 2

    def flops(self, batch: TrainingBatch) -> int:
        """FLOPs of one forward pass."""
        b, _, frames, height, width = batch.windows.latents.shape
        text = batch.condition.text
        return int(self.model.flops(b, frames, height, width, 0 if text is None else text.shape[1]))


def held_out_losses(objective: LatentObjective, sampler: NoiseSampler, held_out: Sequence[Windows],
                    group: EvaluationGroup | None = None, part: float = 1.0) -> dict[str, float]:
    """The mean loss on held-out windows, as in training, and at each quantile of the timesteps, on some of them.

    The forward passes are spread over the processes of `group`, whose budget may leave batches out; `part`: of it.
    """
    counts = [len(windows.names) for windows in held_out]

    def run(passes: list[Pass]) -> list[float]:
        return [float(objective.loss(sampler.held_out(held_out[i], quantile))) for i, quantile in passes]

    losses = (group or EvaluationGroup()).evaluate("held-out batches", len(held_out), run,
                                                   lambda limit: held_out_passes(counts, limit), part)
    draws: dict[str, float | None] = {"loss_heldout": None}
    draws |= {f"loss_heldout_t{round(100 * q)}": q for q in QUANTILES}
    return {name: sum(loss * counts[i] for (i, q), loss in losses.items() if q == quantile)
            / sum(counts[i] for i, q in losses if q == quantile) for name, quantile in draws.items()}


def held_out_passes(counts: Sequence[int], limit: int) -> list[Pass]:
    """The forward passes over `limit` of some batches with so many clips: over each one as in training; and at each
    quantile over the fewest that have `QUANTILE_CLIPS` clips, evenly spaced as the batches are ordered by shape."""
    batches = evenly(limit, len(counts))
    some = next((few for few in ([batches[i] for i in evenly(number, limit)] for number in range(1, limit))
                 if sum(counts[i] for i in few) >= QUANTILE_CLIPS), batches)
    return [(i, None) for i in batches] + [(i, quantile) for quantile in QUANTILES for i in some]


# --- Denoising diffusion: E w(t) |e(x_t, t, condition) - e|^2, or v in place of e; the whole video has one t. ---


class DiffusionConfig(Config):
    """The defaults are those of the public training. The schedule is that of the pipeline's scheduler."""

    snr_gamma: float | None = Field(5.0, gt=0)  # see `diffusion.min_snr_weight`; None: every timestep has the weight 1
    noise_offset: float = Field(0.02, ge=0)  # deviation of a shift of the noise, one per sample and channel: overall
    #                                          brightness and colour are noised too
    condition_dropout: float = Field(0.1, ge=0, lt=1)  # share of captions dropped, for guidance (2207.12598)


class DiffusionNoiseSampler(NoiseSampler):
    """Draws a timestep in 0 ... `timesteps` - 1 for each sample, uniformly."""

    stream = "diffusion"

    def __init__(self, diffusion: DiffusionConfig, condition: Conditioner, *, seed: int, num_timesteps: int) -> None:
        super().__init__(condition, seed=seed, dropout=diffusion.condition_dropout)
        self.diffusion, self.num_timesteps = diffusion, num_timesteps

    def timesteps(self, windows: Windows, rng: torch.Generator) -> Tensor:
        return torch.randint(self.num_timesteps, (), generator=rng)

    def quantile(self, windows: Windows, quantile: float) -> int:
        return int(quantile * self.num_timesteps)

    def noise(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        shift = self.diffusion.noise_offset * torch.randn((shape[0], 1, 1, 1), generator=rng)
        return super().noise(shape, rng) + shift


class DenoisingDiffusion(LatentObjective):
    """
    Args:
        alphas_cumprod: (timesteps,) of the schedule.
        prediction: what the model predicts.
    """

    label = "denoising loss"
    non_muon_pattern = r"embed|adaln|norm|caption_projection|scale_shift_table|proj_out|lora"

    model: OpenSoraT2VTransformer3DModel
    alphas_cumprod: Tensor

    def __init__(self, model: OpenSoraT2VTransformer3DModel, diffusion: DiffusionConfig, alphas_cumprod: Tensor,
                 prediction: PredictionType) -> None:
        super().__init__()
        self.model, self.diffusion, self.prediction = model, diffusion, prediction
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def loss(self, batch: TrainingBatch) -> Tensor:
        weights = next(self.model.parameters())
        device, dtype = weights.device, weights.dtype
        x0, noise, t = (v.to(device, non_blocking=True) for v in (batch.windows.latents, batch.noise, batch.t))
        condition = batch.condition.to(device, non_blocking=True)
        assert condition.text is not None
        alpha = self.alphas_cumprod.to(device)[t]
        predicted = self.model(add_noise(x0, noise, alpha).to(dtype), t, condition.text.to(dtype),
                               condition.text_mask).sample
        error = (predicted.float() - target(x0, noise, alpha, self.prediction)).square().mean(dim=(1, 2, 3, 4))
        if self.diffusion.snr_gamma is not None:
            error = error * min_snr_weight(alpha, self.prediction, self.diffusion.snr_gamma)
        return error.mean()
