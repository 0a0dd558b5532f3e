"""Flow matching: E |v(x_t, t, condition) - (e - x_0)|^2 over the groups that are not history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from odvae.trainer.throughput import TRAIN_TO_FORWARD
from odvae.utils.config import Config

from ..condition import Condition, Conditioner
from ..defaults import GUIDANCE_RESCALE
from ..flow import (
    NoiseLevels,
    Regime,
    corrupted_levels,
    interpolate,
    noise_levels,
    resolution_shift,
    timestep_quantile,
    velocity,
)
from ..flow_map import Derivative
from ..model.groups import group_sizes
from ..model.transformer import LVDMTransformer3DModel
from .batch import HistoryDraws, OwnHistoryDraws, TrainingBatch
from .history import CorruptionConfig, ForcedHistory, predict_by_group
from .objective import LatentObjective, NoiseSampler
from .self_rollout import SelfRolloutConfig, draw_own_history, own_history
from .windows import Windows


class FlowMapConfig(Config):
    """Where an interval leads to, what it is trained with, and the guidance that is learned in. See `flow_map`."""

    equal: float = Field(0.5, ge=0, le=1)  # share of the samples with r = t: flow matching
    zero: float = Field(0.25, ge=0, le=1)  # share with r = 0: to the clean sample at once; of the others r is uniform
    from_noise: float = Field(0.25, ge=0, le=1)  # share of the intervals that begin at t = 1, as a rollout does; the
    #                                              density of timesteps hardly gets there
    derivative: Derivative = "central"  # differences (AnyFlow, 2605.13724), or a Jacobian-vector product: uncompiled,
    #                                     one process
    delta: float = Field(0.05, gt=0, le=0.2)  # half of the interval of these differences. A trained model ripples in t:
    #                                           of the shipped one du/dt has an RMS of 1.3, but 4.4 at .005, exactly 2.9
    adaptive: float = Field(1.0, ge=0, le=1)  # a sample's weight is (error + .001)^-adaptive (2505.13447, eq. 22)
    guidance: tuple[float, float] | None = (1.0, 4.0)  # scales to learn, drawn log-uniformly; None: two passes a step
    guidance_rescale: float = Field(GUIDANCE_RESCALE, ge=0, le=1)  # learned in too, see `flow.rescale_guidance`

    @model_validator(mode="after")
    def _check_ranges(self) -> FlowMapConfig:
        if self.equal + self.zero > 1:
            raise ValueError(f"equal + zero = {self.equal + self.zero:g} must be at most 1")
        if self.guidance is not None and not 1 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance={list(self.guidance)} must be [lowest, highest], the lowest at least 1")
        return self


class FlowConfig(Config):
    mean: float = 0.0  # of the logit-normal density of timesteps
    std: float = Field(1.0, gt=0)
    shift: float | None = Field(None, gt=0)  # None: by the number of tokens, see `flow.resolution_shift`
    regimes: dict[Regime, float] = Field({"group": 0.5, "prefix": 0.5}, min_length=1)  # see `flow.noise_levels`; these
    #                                                                                    two stay unless given as 0
    history_noise: float = Field(0.1, ge=0, lt=1)  # highest noise level of a prefix, and of a forced history
    corruption: CorruptionConfig | None = None  # of these histories, in place of one light level
    self_rollout: SelfRolloutConfig | None = None  # in the regime "teacher": histories that the model made itself
    first_frame_weight: float = Field(1.0, gt=0)  # of the first latent in the loss: the whole video keeps its content
    condition_dropout: float = Field(0.1, ge=0, lt=1)  # share of captions dropped, for guidance (2207.12598)
    map: FlowMapConfig | None = None  # train a flow map, to sample in few steps; None: the velocity alone

    @property
    def teacher_forcing(self) -> bool:
        return self.regimes.get("teacher", 0) > 0

    @model_validator(mode="after")
    def _check_histories(self) -> FlowConfig:
        if self.self_rollout is not None and not self.teacher_forcing:
            raise ValueError("self_rollout replaces the history of regime teacher; add it to regimes")
        if self.corruption is not None and not self.teacher_forcing and not self.regimes.get("prefix"):
            raise ValueError("corruption is of the history in regimes prefix and teacher; add one to regimes")
        return self


class FlowNoiseSampler(NoiseSampler):
    """Draws a timestep in (0, 1) for each group of latents, see `flow.noise_levels`, and then its history."""

    stream = "flow"

    def __init__(self, flow: FlowConfig, condition: Conditioner, *, seed: int, group_size: int,
                 patch_size: int) -> None:
        super().__init__(condition, seed=seed, dropout=flow.condition_dropout)
        self.flow, self.group_size, self.patch_size = flow, group_size, patch_size

    def __call__(self, windows: Windows, step: int) -> TrainingBatch:
        batch, own = super().__call__(windows, step), self.flow.self_rollout
        return batch if own is None or step >= own.after else _on_true_history(batch)

    def held_out(self, windows: Windows, quantile: float | None = None) -> TrainingBatch:
        batch = _on_true_history(super().held_out(windows, quantile))
        return batch if quantile is None else replace(batch, noised=None)

    def _draw(self, windows: Windows, rngs: Sequence[torch.Generator], dropout: float) -> TrainingBatch:
        levels = [self.levels(windows, rng) for rng in rngs]
        batch = self._draw_at(windows, torch.stack([level.t for level in levels]), rngs, dropout)
        return self._draw_history(batch, levels, rngs)

    def levels(self, windows: Windows, rng: torch.Generator) -> NoiseLevels:
        """Draw the noise levels of a sample."""
        flow, groups = self.flow, group_sizes(windows.latents.shape[2], self.group_size)
        return noise_levels(rng, groups, flow.regimes, mean=flow.mean, std=flow.std, shift=self.shift(windows),
                            history_noise=flow.history_noise)

    def _draw_history(self, batch: TrainingBatch, levels: Sequence[NoiseLevels],
                      rngs: Sequence[torch.Generator]) -> TrainingBatch:
        flow, shape = self.flow, batch.windows.latents.shape[1:]
        if flow.corruption is None and not flow.teacher_forcing:
            return batch
        seen = torch.stack([self._history_levels(shape[1], rng) for rng in rngs])
        if flow.corruption is not None:
            prefix = torch.arange(shape[1]) < torch.tensor([level.history for level in levels])[:, None]
            batch = replace(batch, t=torch.where(prefix, seen, batch.t),
                            noised=(batch.t > flow.history_noise) & ~prefix)
        if not flow.teacher_forcing:
            return batch
        forced = torch.tensor([level.regime == "teacher" for level in levels])
        noise, own = torch.stack([self.noise(shape, rng) for rng in rngs]), None
        if flow.self_rollout is not None:
            own_noise = torch.stack([self.noise(shape, rng) for rng in rngs])
            own = draw_own_history(flow.self_rollout, forced, own_noise, rngs)
        return replace(batch, history=HistoryDraws(forced, noise, seen, own))

    def _history_levels(self, frames: int, rng: torch.Generator) -> Tensor:
        """Draw the levels (frames,) of a history: one light level, or corrupted."""
        corruption = self.flow.corruption
        if corruption is not None:
            return corrupted_levels(rng, frames, corruption.share, corruption.noise)
        return (self.flow.history_noise * torch.rand(1, generator=rng)).expand(frames)

    def quantile(self, windows: Windows, quantile: float) -> float:
        return timestep_quantile(quantile, self.flow.mean, self.flow.std, self.shift(windows))

    def shift(self, windows: Windows) -> float:
        """The timestep shift for windows of this size."""
        if self.flow.shift is not None:
            return self.flow.shift
        height, width = windows.latents.shape[3:]
        return resolution_shift(self.group_size * height * width // self.patch_size**2)


class FlowMatching(LatentObjective):
    label = "rectified-flow loss"
    _timesteps_per_sample = False
    non_muon_pattern = r"embed|adaln|modulation|norm|project_out|lora"

    model: LVDMTransformer3DModel

    def __init__(self, model: LVDMTransformer3DModel, flow: FlowConfig) -> None:
        super().__init__()
        self.model, self.flow = model, flow

    def loss(self, batch: TrainingBatch) -> Tensor:
        return self.errors(batch).mean()

    def errors(self, batch: TrainingBatch) -> Tensor:
        """Return the mean squared error of each sample, (B,), over its frames that are not history."""
        x0, noise, t = (self._to_device(tensor) for tensor in (batch.windows.latents, batch.noise, batch.t))
        condition = self._condition(batch.condition)
        predicted = self.predict(batch.windows, interpolate(x0, noise, t), t, condition, self.history(batch, condition))
        return self._mean_error(predicted, velocity(x0, noise), self.noised(batch, t))

    def predict(self, windows: Windows, x: Tensor, t: Tensor, condition: Condition,
                history: ForcedHistory | None = None, **target: Tensor | None) -> Tensor:
        """Evaluate the model on x (B, c, T, h, w) at the levels t (B, T), in the layout of `windows`; with `history`
        each group on that."""
        layout: dict[str, Any] = {"positions": windows.positions, "frame_rate": windows.frame_rate,
                                  **condition.arguments, **target}
        if history is not None:
            return predict_by_group(self.model, x, t, history, **layout).float()
        groups = group_sizes(x.shape[2], self.model.config.group_size)
        sample: Tensor = self.model(x, t, groups=groups, **layout).sample
        return sample.float()

    def history(self, batch: TrainingBatch, condition: Condition,
                guidance: Tensor | None = None) -> ForcedHistory | None:
        """The history that groups are predicted from: the true one, or one that the model makes now."""
        draws, windows, model = batch.history, batch.windows, self.model
        if draws is None:
            return None
        clean, noise, t, forced = map(self._to_device, (windows.latents, draws.noise, draws.t, draws.forced))
        if draws.own is not None and self.flow.self_rollout is not None:
            rows = self._to_device(torch.tensor(draws.own.samples))
            start, own_noise, replaced = map(self._to_device, (draws.own.start, draws.own.noise, draws.own.replaced))
            options = condition.select(draws.own.samples).arguments
            if guidance is not None:
                options["guidance"] = guidance[rows]
            own = own_history(model, clean[rows], start[rows], own_noise[rows], noise[rows], t[rows],
                              self.flow.self_rollout.steps, positions=windows.positions,
                              frame_rate=windows.frame_rate, **options)
            clean = torch.where(replaced[:, None, None, None, None], clean.index_copy(0, rows, own), clean)
        return ForcedHistory(interpolate(clean, noise, t), t, forced)

    def noised(self, batch: TrainingBatch, t: Tensor) -> Tensor:
        """(B, T) bool: the frames that are predicted, whose levels are t. At a lower level the noise to predict is
        hardly visible."""
        return t > self.flow.history_noise if batch.noised is None else self._to_device(batch.noised)

    def example(self) -> TrainingBatch | None:
        batch = super().example()
        if batch is None or not self.flow.teacher_forcing:
            return batch
        forced = torch.ones(len(batch.t), dtype=torch.bool)
        own = None
        if self.flow.self_rollout is not None:
            own = OwnHistoryDraws(forced, tuple(range(len(forced))), batch.t[:, 0], batch.noise)
        return replace(batch, history=HistoryDraws(forced, batch.noise, batch.t, own))

    def flops(self, batch: TrainingBatch) -> int:
        """FLOPs of one forward pass; with those of the history, and of the model's own, which has no backward pass."""
        flops, history = super().flops(batch), batch.history
        if history is None:
            return flops
        b, _, frames, height, width = batch.windows.latents.shape
        text = batch.condition.text
        before = frames - group_sizes(frames, self.model.config.group_size)[-1]
        seen = self.model.flops(b, before, height, width, 0 if text is None else text.shape[1]) if before else 0
        own, passes = self.flow.self_rollout, 0.0
        if history.own is not None and own is not None:
            passes = (own.steps + 1) * len(history.own.samples) / b / TRAIN_TO_FORWARD
        return int(flops + (1 + passes) * seen)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).device, non_blocking=True)

    def _condition(self, condition: Condition) -> Condition:
        return condition.to(next(self.model.parameters()).device, non_blocking=True)

    def _mean_error(self, predicted: Tensor, target: Tensor, noised: Tensor) -> Tensor:
        """The mean over the frames that are `noised` (B, T), weighted: (B, c, T, h, w) twice -> (B,)."""
        error = (predicted - target).square().mean(dim=(1, 3, 4))  # (B, T)
        weight = noised.float()
        weight[:, 0] *= self.flow.first_frame_weight
        return (error * weight).sum(1) / weight.sum(1).clamp(min=1)


def _on_true_history(batch: TrainingBatch) -> TrainingBatch:
    """Leave out the model's own history."""
    if batch.history is None or batch.history.own is None:
        return batch
    return replace(batch, history=replace(batch.history, own=None))
