"""The training objective: E |v(x_t, t, condition) - (e - x_0)|^2 over the groups that are not history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from odvae.trainer.trainer import Objective
from odvae.utils.config import Config
from odvae.utils.seeding import generator

from ..condition import Condition, Conditioner
from ..flow import Regime, interpolate, noise_levels, resolution_shift, timestep_quantile, velocity
from ..model.groups import group_sizes
from ..model.transformer import LVDMTransformer3DModel
from .windows import Windows

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps, at which the held-out loss is logged


class FlowConfig(Config):
    mean: float = 0.0  # of the logit-normal density of timesteps
    std: float = Field(1.0, gt=0)
    shift: float | None = Field(None, gt=0)  # None: by the number of tokens, see `flow.resolution_shift`
    regimes: dict[Regime, float] = Field({"group": 0.5, "prefix": 0.5}, min_length=1)  # see `flow.noise_levels`
    history_noise: float = Field(0.1, ge=0, lt=1)  # highest noise level of a prefix
    first_frame_weight: float = Field(1.0, gt=0)  # of the first latent in the loss: the whole video keeps its content
    condition_dropout: float = Field(0.1, ge=0, lt=1)  # share of captions dropped, for guidance (2207.12598)


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of windows with everything that is drawn at random for it."""

    windows: Windows
    noise: Tensor         # (B, c, T, h, w)
    t: Tensor             # (B, T) timesteps
    condition: Condition  # of B samples
    groups: tuple[int, ...]

    @property
    def names(self) -> Sequence[str]:
        return self.windows.names

    @property
    def frames(self) -> int:
        return self.windows.frames


class NoiseSampler:
    """Draws noise, timesteps and dropped captions. They are a pure function of (seed, step, index of the sample among
    all samples of the step), so that it does not matter how many processes share the step."""

    def __init__(self, flow: FlowConfig, condition: Conditioner, *, seed: int, group_size: int,
                 patch_size: int) -> None:
        self.flow, self.condition, self.seed = flow, condition, seed
        self.group_size, self.patch_size = group_size, patch_size

    def __call__(self, windows: Windows, step: int) -> TrainingBatch:
        return self._draw(windows, [generator(self.seed, "flow", step, index) for index in windows.sample_indices],
                          self.flow.condition_dropout)

    def held_out(self, windows: Windows, quantile: float | None = None) -> TrainingBatch:
        """Always the same draw, without dropped captions; with `quantile` all groups are at that quantile of the
        timesteps."""
        batch = self._draw(windows, [generator(0, "held out", index) for index in windows.sample_indices], 0.0)
        if quantile is None:
            return batch
        level = timestep_quantile(quantile, self.flow.mean, self.flow.std, self.shift(windows))
        return replace(batch, t=torch.full_like(batch.t, level))

    def shift(self, windows: Windows) -> float:
        """The timestep shift for windows of this size."""
        if self.flow.shift is not None:
            return self.flow.shift
        height, width = windows.latents.shape[3:]
        return resolution_shift(self.group_size * height * width // self.patch_size**2)

    def _draw(self, windows: Windows, rngs: Sequence[torch.Generator], dropout: float) -> TrainingBatch:
        flow, shape = self.flow, windows.latents.shape[1:]
        groups = group_sizes(shape[1], self.group_size)
        t = torch.stack([noise_levels(rng, groups, flow.regimes, mean=flow.mean, std=flow.std,
                                      shift=self.shift(windows), history_noise=flow.history_noise) for rng in rngs])
        captions = ["" if float(torch.rand((), generator=rng)) < dropout else caption
                    for rng, caption in zip(rngs, windows.captions, strict=True)]
        noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
        return TrainingBatch(windows, noise, t, self.condition(captions), groups)


class FlowMatching(Objective):
    """The loss of a batch; it draws no random numbers."""

    non_muon_pattern = r"embed|adaln|modulation|norm|project_out|lora"

    model: LVDMTransformer3DModel

    def __init__(self, model: LVDMTransformer3DModel, flow: FlowConfig) -> None:
        super().__init__()
        self.model, self.flow = model, flow

    def forward(self, batch: TrainingBatch, step: int, micro_batch: int) -> dict[str, Tensor]:
        return {"loss": self.loss(batch)}

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The mean over samples of the mean over their frames: equal micro-batches have the same mean."""
        device = next(self.model.parameters()).device
        x0, noise, t = (v.to(device, non_blocking=True) for v in (batch.windows.latents, batch.noise, batch.t))
        predicted = self.model(interpolate(x0, noise, t), t, **batch.condition.to(device).arguments,
                               groups=batch.groups, positions=batch.windows.positions,
                               frame_rate=batch.windows.frame_rate).sample
        error = (predicted.float() - velocity(x0, noise)).square().mean(dim=(1, 3, 4))  # (B, T)
        weight = (t > self.flow.history_noise).float()  # below that level the noise to predict is hardly visible
        weight[:, 0] *= self.flow.first_frame_weight
        return ((error * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()

    def tokens(self, batch: TrainingBatch) -> int:
        """Tokens of a batch in the transformer."""
        b, _, frames, height, width = batch.windows.latents.shape
        return b * frames * height * width // int(self.model.config.patch_size) ** 2

    def flops(self, batch: TrainingBatch) -> int:
        """FLOPs of one forward pass."""
        b, _, frames, height, width = batch.windows.latents.shape
        text = batch.condition.text
        return self.model.flops(b, frames, height, width, 0 if text is None else text.shape[1], batch.groups)


def held_out_losses(objective: FlowMatching, sampler: NoiseSampler, held_out: Sequence[Windows]) -> dict[str, float]:
    """The mean loss on held-out windows, as in training, and at each quantile of the timesteps."""
    draws: dict[str, float | None] = {"loss_heldout": None}
    draws |= {f"loss_heldout_t{round(100 * q)}": q for q in QUANTILES}
    count = sum(len(windows.names) for windows in held_out)
    return {name: sum(float(objective.loss(sampler.held_out(windows, quantile))) * len(windows.names)
                      for windows in held_out) / count for name, quantile in draws.items()}
