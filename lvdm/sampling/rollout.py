"""Rolling out a video group after group, each on a sliding window of clean history: constant cost at any length.

A group starts as noise and goes to data by a scheduler of diffusers. What it looks back on, the clip's first latent
(the sink, which holds what is in the video) and the `window` groups before, is lightly re-noised (which lowers drift:
SkyReels-V2, 2504.13074), goes through the transformer once, and serves all the steps as cached keys and values.
Positions (`frame_positions`) stay inside the trained range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from odvae.utils.errors import UserError
from odvae.utils.finite import check_finite, is_finite, non_finite
from odvae.utils.seeding import generator

from ..condition import Condition
from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_NOISE, STEPS, WINDOW
from ..flow import guide, interpolate, rescale_guidance, resolution_shift
from ..model.groups import frame_positions, group_sizes
from ..model.transformer import LVDMTransformer3DModel
from .schedulers import Solver


@dataclass(frozen=True)
class RolloutStep:
    """The scheduler has made one step (of second order: half a one). Counts are from 1. `estimate`: what the group's
    clean, normalised latents (B, c, t, h, w) look like so far."""

    group: int
    groups: int
    step: int
    steps: int
    estimate: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RolloutGroup:
    """Group `group` of `groups` (from 1) is done: its clean, normalised latents (B, c, t, h, w) float32."""

    group: int
    groups: int
    latents: Tensor


def group_layout(latents: int, given: int, group_size: int) -> tuple[int, ...]:
    """Latent frames of each group of `latents` of which the first `given` are not made but gone on from.

    Those are cut from their end, the clip's first latent alone, so that what is made continues whole groups; an odd one
    comes second and leaves the window first. (8, 4, 2) -> (1, 1, 2, 2, 2); (8, 0, 2) -> (1, 2, 2, 2, 1)."""
    if not given:
        return group_sizes(latents, group_size)
    before = (1, *reversed(group_sizes(given, group_size)[1:]))
    return before if given == latents else (*before, *group_sizes(latents - given, group_size, first_alone=False))


def rollout(
    transformer: LVDMTransformer3DModel,
    condition: Condition | Callable[[int], Condition],  # of B samples; or that of the group with this first latent
    null: Condition,                   # of B samples or 1, to guide away from: that of "" as a rule
    *,
    latents: int,                      # latent frames to make, besides `initial`
    height: int,                       # of the latents
    width: int,
    seeds: Sequence[int],              # one a sample: the noise of group g is a pure function of (seed, g)
    scheduler: Any = None,             # see `solver`; None: Euler's
    steps: int = STEPS,                # of the scheduler, a group
    guidance_scale: float = GUIDANCE_SCALE,  # 1: none, at half the cost (2207.12598)
    guidance_rescale: float = GUIDANCE_RESCALE,  # share of guidance's contrast that is taken back
    shift: float | None = None,        # of the timesteps, `flow.timesteps_schedule`; None: `flow.resolution_shift`
    window: int = WINDOW,              # groups that a group looks back on, besides the first latent
    history_noise: float = HISTORY_NOISE,  # noise level in [0, 1) of what it looks back on
    frame_rate: float | None = None,   # of the video; None: the transformer's
    initial: Tensor | None = None,     # (B, c, T0, h, w) clean latents from a clip's first on, to go on from
    use_cache: bool = True,            # False: the window goes through with every step; the same values, slower
    device: torch.device | None = None,  # None: the transformer's
) -> Iterator[RolloutStep | RolloutGroup]:
    """Make `latents` latent frames, group after group; yields after every step and after every group.

    Whole groups are made and the last one is cut, so a short video is the beginning of a longer one, and batch
    composition does not matter. `initial` is cut into groups by `group_layout`, and goes on exactly as if it had been
    rolled out where its length is that of whole groups.

    Raises:
        UserError: at once, for counts, levels or shapes that make no sense, and for numbers that are not finite.
        NonFiniteError: by the step where the transformer or the solver gives values that are not finite.
    """
    batch, config, device = len(seeds), transformer.config, device or transformer.device
    _check_numbers(latents, steps, window, history_noise, guidance_scale, guidance_rescale, shift, frame_rate)
    shape = (config.in_channels, height, width)
    given: list[Tensor] = []
    if initial is not None:
        if initial.ndim != 5 or not initial.shape[2] or (*initial.shape[:2], *initial.shape[3:]) != (batch, *shape):
            raise UserError(f"initial latents must be (B, c, T, h, w) = {(batch, shape[0], 'T', *shape[1:])}, "
                            f"got {tuple(initial.shape)}")
        if not is_finite(initial):
            raise UserError("initial latents hold NaN or infinity; make them again")
        length = initial.shape[2]
        given = list(initial.float().split(group_layout(length, length, config.group_size), dim=2))
    if shift is None:
        shift = resolution_shift(config.group_size * height * width // config.patch_size**2)
    guided = guidance_scale != 1 and bool(null.arguments)
    null = null.select([0] * batch) if _length(null) == 1 else null

    def of_group(first: int) -> Condition:
        now = condition(first) if callable(condition) else condition
        if _length(now) not in (batch, None):
            raise UserError(f"{batch} seeds were given for {_length(now)} samples' condition; give one each")
        return (now.concat(null) if guided else now).to(device)

    of_group(0)
    velocity = partial(_velocity, transformer, copies=2 if guided else 1, guidance_scale=guidance_scale,
                       guidance_rescale=guidance_rescale, history_noise=history_noise, frame_rate=frame_rate,
                       use_cache=use_cache)
    solver = partial(Solver, scheduler or FlowMatchEulerDiscreteScheduler(), steps, shift, list(seeds))
    return _groups(velocity, of_group, solver, given, latents, config.group_size, (batch, *shape), device, list(seeds),
                   window, history_noise)


def _check_numbers(latents: int, steps: int, window: int, history_noise: float, guidance_scale: float,
                   guidance_rescale: float, shift: float | None, frame_rate: float | None) -> None:
    """Raise UserError for what is out of range; NaN is out of every range."""
    if latents < 1 or steps < 1 or window < 1:
        raise UserError(f"latents, steps and window must be at least 1, got {latents}, {steps} and {window}")
    if not 0 <= history_noise < 1:
        raise UserError(f"history_noise must lie in [0, 1), got {history_noise}")
    if not math.isfinite(guidance_scale):
        raise UserError(f"guidance_scale must be a finite number, got {guidance_scale}")
    if not 0 <= guidance_rescale <= 1:
        raise UserError(f"guidance_rescale must lie in [0, 1], got {guidance_rescale}")
    for name, value in ("shift", shift), ("frame_rate", frame_rate):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} must be above 0 and finite, got {value}")


def _length(condition: Condition) -> int | None:
    """Samples of a condition; None where there is nothing to be conditioned on."""
    return next((len(value) for value in condition.arguments.values()), None)


@torch.no_grad()
def _groups(
    velocity: Callable[[Condition, list[Tensor], bool], Callable[[Tensor, float], Tensor]],
    condition: Callable[[int], Condition],
    solver: Callable[[int], Solver],
    given: list[Tensor],               # the groups to go on from
    latents: int,
    group_size: int,
    shape: tuple[int, int, int, int],  # B, c, h, w
    device: torch.device,
    seeds: Sequence[int],
    window: int,
    history_noise: float,
) -> Iterator[RolloutStep | RolloutGroup]:
    batch, c, h, w = shape
    sizes = group_sizes(latents, group_size, first_alone=not given)
    seen: dict[int, Tensor] = {}  # the first and the last `window` groups, re-noised once: each reader sees the same

    def remember(group: int, clean: Tensor) -> None:
        noise = _noise(seeds, "history", group, clean.shape[1:], device)
        seen[group] = interpolate(clean.to(device), noise, torch.full((batch,), history_noise, device=device))
        if group > window:
            seen.pop(group - window, None)

    for group, clean in enumerate(given):
        if group == 0 or group >= len(given) - window:
            remember(group, clean)
    first = sum(group.shape[2] for group in given)
    for number, wanted in enumerate(sizes, start=1):
        group = len(given) + number - 1
        predict = velocity(condition(first), list(seen.values()), group > window)
        x = _noise(seeds, "noise", group, (c, group_size if group else 1, h, w), device)
        solve = solver(group)
        for index, t in enumerate(solve.levels):
            v = predict(x, t)
            estimate = x - t * v
            x = solve.step(index, x, v)
            check_finite(x, "guidance, or the scheduler's step after it,")
            yield RolloutStep(number, len(sizes), index + 1, len(solve.levels), estimate[:, :, :wanted])
        first += x.shape[2]
        remember(group, x)
        yield RolloutGroup(number, len(sizes), x[:, :, :wanted])


def _noise(seeds: Sequence[int], stream: str, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, *shape) normal numbers; row b is a pure function of (seeds[b], stream, group). Drawn on the CPU, so the same
    on every device."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, group)) for seed in seeds]).to(device)


def _velocity(
    transformer: Any,                  # LVDMTransformer3DModel
    condition: Condition,
    seen: list[Tensor],                # the groups before that are in sight, re-noised
    far: bool,                         # from the clip's first latent: see `frame_positions`
    *,
    copies: int,                       # 2: the batch is conditional rows, then unconditional ones; 1: no guidance
    guidance_scale: float,
    guidance_rescale: float,
    history_noise: float,
    frame_rate: float | None,
    use_cache: bool,
) -> Callable[[Tensor, float], Tensor]:
    """The guided velocity of the group that follows `seen`, as a function of (x, t)."""
    ask = partial(transformer, **condition.arguments, frame_rate=frame_rate)
    seen = [group.repeat(copies, 1, 1, 1, 1) for group in seen]
    groups = tuple(group.shape[2] for group in seen)
    past, history = sum(groups), None
    group_size = transformer.config.group_size
    if seen and use_cache:
        window = torch.cat(seen, dim=2)
        levels = window.new_full((len(window), past), history_noise)
        history = ask(window, levels, groups=groups, positions=frame_positions(past, group_size, far),
                      return_history=True).history
        seen, groups = [], ()

    def predict(x: Tensor, t: float) -> Tensor:
        new, before = x.shape[2], sum(groups)
        at = x.new_full((len(x) * copies, before + new), t)
        at[:, :before] = history_noise
        positions = frame_positions(past + new, group_size, far)[-at.shape[1]:]
        v = ask(torch.cat([*seen, x.repeat(copies, 1, 1, 1, 1)], dim=2), at, groups=(*groups, new),
                positions=positions, history=history).sample[:, :, -new:].float()
        if not is_finite(v):
            raise non_finite("the transformer", transformer, f"at noise level {t:.3g}, with guidance_scale="
                             f"{guidance_scale:g}, for values of up to {float(x.abs().max()):.3g}")
        if copies == 1:
            return v
        cond, null = v.chunk(2)
        guided, reference = guide(null, cond, guidance_scale)
        return rescale_guidance(x, t, reference, guided, guidance_rescale)

    return predict
