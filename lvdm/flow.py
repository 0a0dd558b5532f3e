"""Rectified flow (2209.03003, 2403.03206): paths, timesteps, noise levels per group.

x_t = (1 - t) x_0 + t e with t = 1 pure noise; the model predicts the velocity v = dx/dt = e - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor


def per_frame(t: Tensor, like: Tensor) -> Tensor:
    """(B, T) or (B,) timesteps, shaped to multiply a (B, c, T, h, w) latent."""
    if t.ndim == 1:
        t = t[:, None]
    return t[:, None, :, None, None].to(like.dtype)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e for x0, noise (B, c, T, h, w) and t (B, T), one per latent frame, or (B,)."""
    return torch.lerp(x0, noise, per_frame(t, x0))


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = e - x_0: the model's target, the same at every t."""
    return noise - x0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): more time near noise for s > 1; keeps 0 and 1 (2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int) -> float:
    """The shift for a group of `tokens` tokens: with more of them the same noise hides less, so the shift grows with
    the square root of their number (2403.03206, section 5.3.2), here from 1 at 256 tokens on."""
    return max(1.0, math.sqrt(tokens / 256))


def sample_timesteps(generator: torch.Generator, shape: Sequence[int], mean: float = 0.0, std: float = 1.0,
                     shift: float = 1.0) -> Tensor:
    """t = shift_time(sigmoid(mean + std n)), n normal (2403.03206, eq. 19), float32 in (0, 1), on its device.

    Its median is shift_time(sigmoid(mean)).
    """
    normal = torch.randn(*shape, generator=generator, device=generator.device)
    return shift_time(torch.sigmoid(mean + std * normal), shift)


def timestep_quantile(quantile: float, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> float:
    """The timestep below which `sample_timesteps` draws that share in (0, 1)."""
    normal = NormalDist(mean, std).inv_cdf(quantile)
    return float(shift_time(torch.sigmoid(torch.tensor(normal, dtype=torch.float64)), shift))


def timesteps_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) float32 timesteps of an Euler solver, descending from 1 to 0."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


Regime = Literal["clip", "group", "prefix", "teacher"]


class NoiseLevels(NamedTuple):
    """Of one sample."""

    t: Tensor  # (T,) timestep of each latent frame
    history: int  # how many of the first are a prefix, and not predicted
    regime: Regime


def noise_levels(
    rng: torch.Generator,
    groups: Sequence[int],             # latent frames per group
    regimes: Mapping[Regime, float],   # how often each is drawn, relative
    *,
    mean: float = 0.0,                 # of the logit-normal density, with std and shift: see `sample_timesteps`
    std: float = 1.0,
    shift: float = 1.0,
    history_noise: float = 0.1,        # highest noise level of a prefix
) -> NoiseLevels:
    """Draw the timesteps of the latent frames of one sample, the same within a group. The regimes are

    - clip: one level for all groups, as in an ordinary video model;
    - group: one level per group (Diffusion Forcing, 2407.01392);
    - prefix: as group, but the groups before a random one share one light level, uniform in [0, history_noise]: the
      history of a rollout, an image to animate, a video to continue (SkyReels-V2, 2504.13074). The random one is any
      but the first; for a clip of one group this is "group";
    - teacher: as group, but a group does not see what the others are noised to: it sees a clean or lightly noised copy
      of those before it, as a step of a rollout does (`training.history`). Every group is trained on such a history.

    Draws the same numbers from `rng` in every regime.
    """
    n = len(groups)
    levels = sample_timesteps(rng, (n,), mean, std, shift)
    which, history, begin = torch.rand(3, generator=rng).tolist()
    regime = list(regimes)[int(np.searchsorted(np.cumsum(list(regimes.values())), which * sum(regimes.values()),
                                               side="right"))]
    prefix = 1 + int(begin * (n - 1)) if regime == "prefix" and n > 1 else 0  # groups
    if regime == "clip":
        levels = levels[:1].expand(n)
    elif prefix:
        levels[:prefix] = history * history_noise
    return NoiseLevels(levels.repeat_interleave(torch.tensor(groups)), sum(groups[:prefix]), regime)


def corrupted_levels(rng: torch.Generator, frames: int, share: float, highest: float) -> Tensor:
    """Draw the levels (frames,) of a strongly corrupted history, each frame by itself: with probability `share` uniform
    in [0, highest], else 0 (Helios). A history whose frames differ in quality is what a drifting rollout has."""
    drawn, level = torch.rand(2, frames, generator=rng)
    return torch.where(drawn < share, level * highest, torch.zeros(frames))


def guide(null: Tensor, cond: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Classifier-free guidance (2207.12598): the velocity null + scale (cond - null), and the part of it that only
    interpolates, by the nearest scale in [0, 1]. At 0 neither depends on `cond`, at 1 neither on `null`."""
    return torch.lerp(null, cond, scale), torch.lerp(null, cond, min(max(scale, 0.0), 1.0))


def rescale_guidance(x: Tensor, t: float | Tensor, reference: Tensor, guided: Tensor, share: float) -> Tensor:
    """Guidance raises the clean sample's contrast, and in a rollout each group passes that on to the next. Rescale the
    clean sample predicted by the guided velocity (B, c, T, h, w) towards the standard deviation per channel of the one
    predicted by `reference`, by `share` of the way (2305.08891, section 3.4, on x_0 = x_t - t v in place of the noise).
    `guide` gives both; for a scale of at least 1 the reference is the conditional velocity. t broadcasts to x."""
    if not share:
        return guided
    clean, target = x - t * guided, x - t * reference
    dims = (2, 3, 4)
    factor = target.std(dims, keepdim=True) / clean.std(dims, keepdim=True).clamp(min=1e-6)
    mean = clean.mean(dims, keepdim=True)
    rescaled = mean + (clean - mean) * torch.lerp(torch.ones_like(factor), factor, share)
    return (x - rescaled) / t
