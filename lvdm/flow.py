"""Rectified flow (2209.03003, 2403.03206): paths, timesteps, noise levels a group.

x_t = (1 - t) x_0 + t e with t = 1 pure noise; the model predicts the velocity v = dx/dt = e - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _per_frame(t: Tensor, like: Tensor) -> Tensor:
    """(B, T) or (B,) timesteps, shaped to multiply a (B, c, T, h, w) latent."""
    if t.ndim == 1:
        t = t[:, None]
    return t[:, None, :, None, None].to(like.dtype)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t e for x0, noise (B, c, T, h, w) and t (B, T), one a latent frame, or (B,)."""
    return torch.lerp(x0, noise, _per_frame(t, x0))


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = e - x_0: what the model is to predict, the same at every t."""
    return noise - x0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): more time near noise for s > 1; keeps 0 and 1 (2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int) -> float:
    """The shift of sampling for latents of so many tokens: the more of them show the same, the more noise it takes to
    hide it, by the square root of their number (2403.03206, section 5.3.2). 1 up to 256 tokens, those of the small
    videos that the shift was tuned on."""
    return max(1.0, math.sqrt(tokens / 256))


def sample_timesteps(generator: torch.Generator, shape: Sequence[int], mean: float = 0.0, std: float = 1.0,
                     shift: float = 1.0) -> Tensor:
    """t = shift_time(sigmoid(mean + std n)), n normal (2403.03206, eq. 19), float32 in (0, 1), on its device.

    Its median is shift_time(sigmoid(mean)).
    """
    normal = torch.randn(*shape, generator=generator, device=generator.device)
    return shift_time(torch.sigmoid(mean + std * normal), shift)


def timesteps_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """(steps + 1,) float32 timesteps of an Euler solver, falling from 1 to 0."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def noise_levels(
    generator: torch.Generator,
    batch: int,
    groups: Sequence[int],             # latent frames a group
    *,
    mean: float = 0.0,                 # of the logit-normal density, with std and shift: see `sample_timesteps`
    std: float = 1.0,
    shift: float = 1.0,
    clean_prefix: float = 0.5,         # share of samples that get a history such as rollout has
    history_noise: float = 0.1,        # highest noise level of such a history
) -> Tensor:
    """(B, T) timestep of each latent frame, the same within a group, drawn independently a group (Diffusion Forcing,
    2407.01392).

    In a share `clean_prefix` of the samples the groups before a random one have light noise instead, one level for all
    of them, uniform in [0, history_noise]: what a rollout looks back on (SkyReels-V2, 2504.13074). The random one is
    any but the first, so that at least one group is history; with one group there is none.

    Draws the same numbers from `generator` whatever the two shares are.
    """
    n, device = len(groups), generator.device
    levels = sample_timesteps(generator, (batch, n), mean, std, shift)
    chosen = torch.rand(batch, generator=generator, device=device) < clean_prefix
    history = torch.rand(batch, 1, generator=generator, device=device) * history_noise
    first = 1 + (torch.rand(batch, generator=generator, device=device) * (n - 1)).long()  # first group that is not
    if n > 1:
        before = torch.arange(n, device=device)[None] < first[:, None]
        levels = torch.where(before & chosen[:, None], history, levels)
    return levels.repeat_interleave(torch.tensor(groups, device=device), dim=1)


def rescale_guidance(x: Tensor, t: float, cond: Tensor, guided: Tensor, share: float) -> Tensor:
    """Guidance makes the clean sample's contrast grow, and in a rollout each group hands that on to the next. Here the
    clean sample that the guided velocity (B, c, T, h, w) points to is brought back towards the deviation per channel of
    the conditional one, by `share` of the way (2305.08891, section 3.4, on x_0 = x_t - t v in place of the noise)."""
    if not share:
        return guided
    clean, wanted = x - t * guided, x - t * cond
    dims = (2, 3, 4)
    factor = wanted.std(dims, keepdim=True) / clean.std(dims, keepdim=True).clamp(min=1e-6)
    mean = clean.mean(dims, keepdim=True)
    rescaled = mean + (clean - mean) * torch.lerp(torch.ones_like(factor), factor, share)
    return (x - rescaled) / t


def drop_condition(generator: torch.Generator, batch: int, p: float) -> Tensor:
    """(B,) bool, True with probability `p`: the captions to replace by "" so that guidance has an unconditional model
    (2207.12598)."""
    return torch.rand(batch, generator=generator, device=generator.device) < p
