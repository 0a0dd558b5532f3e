"""Training of a flow map by its own derivative: the identity of MeanFlow (2505.13447), along the velocity that the
model itself predicts, as in improved MeanFlow (2512.02012). There is no teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from odvae.trainer.throughput import TRAIN_TO_FORWARD
from odvae.utils.seeding import generator

from ..condition import Condition, Conditioner
from ..flow import interpolate, per_frame, rescale_guidance, velocity
from ..flow_map import draw_interval, total_derivative
from ..model.groups import group_sizes
from ..model.norm import without_autocast
from ..model.transformer import LVDMTransformer3DModel
from .batch import TrainingBatch
from .flow_matching import FlowConfig, FlowMapConfig, FlowMatching, FlowNoiseSampler
from .history import ForcedHistory
from .windows import Windows

FLOOR = 1e-3  # added to an error before it becomes a weight


@dataclass(frozen=True)
class FlowMapBatch(TrainingBatch):
    """A batch with the interval of each frame, and the guidance of each sample."""

    r: Tensor  # (B, T) levels that the intervals lead to, at most t
    moving: tuple[int, ...]  # the samples with r < t
    guidance: Tensor | None = None  # (B,) scales
    null: Condition | None = None  # of one sample, to guide away from


class FlowMapNoiseSampler(FlowNoiseSampler):
    """Draws what flow matching draws, the same numbers, and then intervals and guidance scales."""

    def __init__(self, flow: FlowConfig, condition: Conditioner, *, guided: bool, **options: Any) -> None:
        super().__init__(flow, condition, **options)
        assert flow.map is not None
        self.map: FlowMapConfig = flow.map
        self.guided = guided

    def __call__(self, windows: Windows, step: int) -> FlowMapBatch:
        rngs = [generator(self.seed, "flow map", step, i) for i in windows.sample_indices]
        return self._draw_intervals(super().__call__(windows, step), rngs)

    def held_out(self, windows: Windows, quantile: float | None = None) -> FlowMapBatch:
        """As of flow matching; at a quantile r = t."""
        batch = super().held_out(windows, quantile)
        if quantile is not None:
            return FlowMapBatch(**_fields(batch), r=batch.t, moving=())
        return self._draw_intervals(batch, [generator(0, "held out flow map", i) for i in windows.sample_indices])

    def _draw_intervals(self, batch: TrainingBatch, rngs: Sequence[torch.Generator]) -> FlowMapBatch:
        noised = batch.t > self.flow.history_noise if batch.noised is None else batch.noised
        forced = torch.zeros(len(batch.t)) if batch.history is None else batch.history.forced
        t, r = (torch.stack(levels) for levels in zip(*(
            self._interval(*sample) for sample in zip(rngs, batch.t, noised, forced, strict=True)), strict=True))
        moving = tuple((r < t).any(dim=1).nonzero().flatten().tolist()) or (0,)  # every process makes the same calls
        if not self.guided or self.map.guidance is None:
            return FlowMapBatch(**_fields(batch) | {"t": t}, r=r, moving=moving)
        low, high = map(math.log, self.map.guidance)
        draws = torch.stack([torch.rand((), generator=rng) for rng in rngs])
        return FlowMapBatch(**_fields(batch) | {"t": t}, r=r, moving=moving, guidance=torch.lerp(
            torch.tensor(low), torch.tensor(high), draws).exp(), null=self.condition([""]))

    def _interval(self, rng: torch.Generator, t: Tensor, noised: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Draw that of a sample. Of groups that see a forced history each moves by itself."""
        sizes = group_sizes(len(t), self.group_size) if forced else (len(t),)
        ends = [draw_interval(rng, *group, equal=self.map.equal, zero=self.map.zero, from_noise=self.map.from_noise)
                for group in zip(t.split(sizes), noised.split(sizes), strict=True)]
        return torch.cat([start for start, _ in ends]), torch.cat([end for _, end in ends])


class FlowMapMatching(FlowMatching):
    """The loss |u(x_t, t, r) - (v - (t - r) du/dt)|^2, with v guided and no gradient through the target.

    A sample's weight is a power of its error: those with an interval are harder, and their targets less certain.
    """

    label = "flow map loss"

    def __init__(self, model: LVDMTransformer3DModel, flow: FlowConfig) -> None:
        super().__init__(model, flow)
        assert flow.map is not None
        self.map: FlowMapConfig = flow.map

    def forward(self, batch: FlowMapBatch, step: int,  # type: ignore[override]
                micro_batch: int) -> dict[str, Tensor]:
        errors = self.errors(batch)
        weights = (errors.detach() + FLOOR) ** -self.map.adaptive
        return {"loss": (weights * errors).mean(), "error": errors.detach().mean()}

    def errors(self, batch: FlowMapBatch) -> Tensor:  # type: ignore[override]
        x0, noise, t, r = (self._to_device(v) for v in (batch.windows.latents, batch.noise, batch.t, batch.r))
        x, condition = interpolate(x0, noise, t), self._condition(batch.condition)
        guidance = None if batch.guidance is None else self._to_device(batch.guidance)
        history = self.history(batch, condition, guidance)
        with torch.no_grad():
            target = self.target(batch, x, t, r, velocity(x0, noise), condition, guidance, history)
        predicted = self.predict(batch.windows, x, t, condition, history, target_timestep=r, guidance=guidance)
        return self._mean_error(predicted, target, self.noised(batch, t))

    def target(self, batch: FlowMapBatch, x: Tensor, t: Tensor, r: Tensor, v: Tensor, condition: Condition,
               guidance: Tensor | None, history: ForcedHistory | None = None) -> Tensor:
        """The average velocity from t down to r, by the identity. v = e - x_0 is right in the mean over samples; where
        guidance is, its difference to the conditional velocity, as the model knows them, is added."""
        windows, own = batch.windows, None
        if guidance is not None and batch.null is not None:
            conditional, own = self._guided_velocity(batch, x, t, condition, guidance, history)
            v = v + (own - conditional)
        if not batch.moving:
            return v
        rows = self._to_device(torch.tensor(batch.moving))
        x, t, r = x[rows], t[rows], r[rows]
        condition, guidance = condition.select(batch.moving), None if guidance is None else guidance[rows]
        history = None if history is None else history.select(rows)
        own = self.predict(windows, x, t, condition, history) if own is None else own[rows]

        def moved(shift: Tensor) -> Tensor:
            return self.predict(windows, x + per_frame(shift, x) * own, t + shift, condition, history,
                                target_timestep=r, guidance=guidance)

        with without_autocast(x):  # differences of numbers that are nearly equal
            rate = total_derivative(moved, t, r, self.map.derivative, self.map.delta)
        return v.index_add(0, rows, -per_frame(t - r, x) * rate)

    def _guided_velocity(self, batch: FlowMapBatch, x: Tensor, t: Tensor, condition: Condition,
                         guidance: Tensor, history: ForcedHistory | None) -> tuple[Tensor, Tensor]:
        """The model's conditional velocity, and its guided velocity by the mean contrast as a rollout has it."""
        assert batch.null is not None
        null = self._condition(batch.null).select([0] * len(x))
        history = None if history is None else history.repeat(2)
        cond, away = self.predict(batch.windows, torch.cat([x, x]), torch.cat([t, t]), condition.concat(null),
                                  history).chunk(2)
        guided = torch.lerp(away, cond, guidance.view(-1, 1, 1, 1, 1))
        sizes = group_sizes(x.shape[2], self.model.config.group_size)
        groups = zip(*(tensor.split(sizes, dim=2) for tensor in (x, per_frame(t, x), cond, guided)), strict=True)
        return cond, torch.cat([rescale_guidance(noised, level, reference, raised, self.map.guidance_rescale)
                                for noised, level, reference, raised in groups], dim=2)

    def example(self) -> FlowMapBatch | None:
        batch = super().example()
        if batch is None:
            return None
        plain, size = FlowMapBatch(**_fields(batch), r=batch.t, moving=()), len(batch.t)
        moving = tuple(range(max(1, round(size * (1 - self.map.equal)))))
        if not self.model.config.guidance_embeds:
            return FlowMapBatch(**_fields(plain) | {"moving": moving})
        return FlowMapBatch(**_fields(plain) | {"moving": moving, "guidance": torch.ones(size),
                                                "null": batch.condition.select([0])})

    def flops(self, batch: FlowMapBatch) -> int:  # type: ignore[override]
        """FLOPs of one forward pass, with those of the passes without a gradient, as a training step takes
        `TRAIN_TO_FORWARD` times as many: two or one for the velocity, two for its derivative."""
        moving = len(batch.moving) / len(batch.t)
        passes = (2 if batch.guidance is not None else moving) + 2 * moving
        return int(super().flops(batch) * (1 + passes / TRAIN_TO_FORWARD))


def _fields(batch: TrainingBatch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in fields(batch)}
