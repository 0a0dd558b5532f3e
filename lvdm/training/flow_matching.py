"""Flow matching: E |v(x_t, t, condition) - (e - x_0)|^2 over the groups that are not history."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from odvae.utils.config import Config

from ..condition import Condition, Conditioner
from ..defaults import GUIDANCE_RESCALE
from ..flow import Regime, interpolate, noise_levels, resolution_shift, timestep_quantile, velocity
from ..flow_map import Derivative
from ..model.groups import group_sizes
from ..model.transformer import LVDMTransformer3DModel
from .batch import TrainingBatch
from .objective import LatentObjective, NoiseSampler
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
    regimes: dict[Regime, float] = Field({"group": 0.5, "prefix": 0.5}, min_length=1)  # see `flow.noise_levels`
    history_noise: float = Field(0.1, ge=0, lt=1)  # highest noise level of a prefix
    first_frame_weight: float = Field(1.0, gt=0)  # of the first latent in the loss: the whole video keeps its content
    condition_dropout: float = Field(0.1, ge=0, lt=1)  # share of captions dropped, for guidance (2207.12598)
    map: FlowMapConfig | None = None  # train a flow map, to sample in few steps; None: the velocity alone


class FlowNoiseSampler(NoiseSampler):
    """Draws a timestep in (0, 1) for each group of latents, see `flow.noise_levels`."""

    stream = "flow"

    def __init__(self, flow: FlowConfig, condition: Conditioner, *, seed: int, group_size: int,
                 patch_size: int) -> None:
        super().__init__(condition, seed=seed, dropout=flow.condition_dropout)
        self.flow, self.group_size, self.patch_size = flow, group_size, patch_size

    def timesteps(self, windows: Windows, rng: torch.Generator) -> Tensor:
        flow, groups = self.flow, group_sizes(windows.latents.shape[2], self.group_size)
        return noise_levels(rng, groups, flow.regimes, mean=flow.mean, std=flow.std, shift=self.shift(windows),
                            history_noise=flow.history_noise)

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
        predicted = self.predict(batch.windows, interpolate(x0, noise, t), t, self._condition(batch.condition))
        return self._mean_error(predicted, velocity(x0, noise), t)

    def predict(self, windows: Windows, x: Tensor, t: Tensor, condition: Condition, **target: Tensor | None) -> Tensor:
        """Evaluate the model on x (B, c, T, h, w) at the levels t (B, T), in the layout of `windows`."""
        sample: Tensor = self.model(x, t, **condition.arguments, **target,
                                    groups=group_sizes(x.shape[2], self.model.config.group_size),
                                    positions=windows.positions, frame_rate=windows.frame_rate).sample
        return sample.float()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).device, non_blocking=True)

    def _condition(self, condition: Condition) -> Condition:
        return condition.to(next(self.model.parameters()).device, non_blocking=True)

    def _mean_error(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The mean over frames, weighted: (B, c, T, h, w) twice and (B, T) -> (B,)."""
        error = (predicted - target).square().mean(dim=(1, 3, 4))  # (B, T)
        weight = (t > self.flow.history_noise).float()  # below that level the noise to predict is hardly visible
        weight[:, 0] *= self.flow.first_frame_weight
        return (error * weight).sum(1) / weight.sum(1).clamp(min=1)
