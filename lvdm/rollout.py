"""Rolling out a video group after group, each on a sliding window of clean history: constant cost at any length.

A group starts as noise and takes `steps` Euler steps. What it looks back on, the clip's first latent (the sink, which
holds what is in the video) and the `window` groups before, is lightly re-noised (which lowers drift: SkyReels-V2,
2504.13074), goes through the transformer once, and serves all the steps as cached keys and values. Positions
(`frame_positions`) stay inside the trained range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from odvae.runtime.errors import UserError
from odvae.runtime.seeding import generator

from .defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, STEPS
from .flow import interpolate, rescale_guidance, timesteps_schedule
from .model.groups import frame_positions, group_sizes
from .model.transformer import LVDMTransformer3DModel


@dataclass(frozen=True)
class RolloutStep:
    """One Euler step is done. Counts are from 1."""

    group: int
    groups: int
    step: int
    steps: int


@dataclass(frozen=True)
class RolloutGroup:
    """Group `group` of `groups` (from 1) is done: its clean, normalised latents (B, c, t, h, w) float32."""

    group: int
    groups: int
    latents: Tensor


def rollout(
    transformer: LVDMTransformer3DModel,
    text: Tensor,                      # (B, M, D)
    text_mask: Tensor,                 # (B, M) bool
    null_text: Tensor,                 # (B or 1, M', D): text to guide away from, that of "" as a rule
    null_mask: Tensor,                 # (B or 1, M') bool
    *,
    latents: int,                      # latent frames to make, besides `initial`
    height: int,                       # of the latents
    width: int,
    seeds: Sequence[int],              # one a sample: the noise of group g is a pure function of (seed, g)
    steps: int = STEPS,                # Euler steps a group
    guidance_scale: float = GUIDANCE_SCALE,  # 1: none, at half the cost (2207.12598)
    guidance_rescale: float = GUIDANCE_RESCALE,  # share of guidance's contrast that is taken back
    shift: float = 1.0,                # of the timesteps, see `flow.timesteps_schedule`
    window: int = 2,                   # groups that a group looks back on, besides the first latent
    history_noise: float = 0.1,        # noise level in [0, 1) of what it looks back on
    initial: Tensor | None = None,     # (B, c, T0, h, w) clean latents from a clip's first on, to go on from
    use_cache: bool = True,            # False: the window goes through with every step; the same values, slower
) -> Iterator[RolloutStep | RolloutGroup]:
    """Make `latents` latent frames, group after group; yields after every Euler step and after every group.

    Whole groups are made and the last one is cut, so a short video is the beginning of a longer one, and batch
    composition does not matter. `initial` is cut into groups from its end (its first latent alone), and goes on exactly
    as if it had been rolled out where its length is that of whole groups.

    Raises:
        UserError: at once, for counts, levels or shapes that make no sense.
    """
    batch, config = text.shape[0], transformer.config
    if latents < 1 or steps < 1 or window < 1:
        raise UserError(f"latents, steps and window must be at least 1, got {latents}, {steps} and {window}")
    if not 0 <= history_noise < 1:
        raise UserError(f"history_noise must lie in [0, 1), got {history_noise}")
    if len(seeds) != batch:
        raise UserError(f"{len(seeds)} seeds were given for {batch} captions; give one each")
    shape = (config.in_channels, height, width)
    clean: list[Tensor] = []
    if initial is not None:
        if initial.ndim != 5 or not initial.shape[2] or (*initial.shape[:2], *initial.shape[3:]) != (batch, *shape):
            raise UserError(f"initial latents must be (B, c, T, h, w) = {(batch, shape[0], 'T', *shape[1:])}, "
                            f"got {tuple(initial.shape)}")
        later = group_sizes(initial.shape[2], config.group_size)[1:]  # an odd one, last, leaves the window first
        clean = list(initial.float().split([1, *reversed(later)], dim=2))
    if guidance_scale != 1:
        longest = max(text.shape[1], null_text.shape[1])
        text, null_text = (pad(x, (0, 0, 0, longest - x.shape[1])) for x in (text, null_text))
        text_mask, null_mask = (pad(x, (0, longest - x.shape[1])) for x in (text_mask, null_mask))
        text = torch.cat([text, null_text.expand(batch, -1, -1)])
        text_mask = torch.cat([text_mask, null_mask.expand(batch, -1)])
    velocity = partial(_velocity, transformer, text, text_mask, copies=text.shape[0] // batch,
                       guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, history_noise=history_noise,
                       use_cache=use_cache)
    return _groups(velocity, clean, latents, config.group_size, (batch, *shape), text.device, list(seeds),
                   timesteps_schedule(steps, shift).tolist(), window, history_noise)


@torch.no_grad()
def _groups(
    velocity: Callable[[list[Tensor], bool], Callable[[Tensor, float], Tensor]],
    given: list[Tensor],               # the groups to go on from
    latents: int,
    group_size: int,
    shape: tuple[int, int, int, int],  # B, c, h, w
    device: torch.device,
    seeds: Sequence[int],
    times: list[float],                # from 1 to 0
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
    for number, wanted in enumerate(sizes, start=1):
        group = len(given) + number - 1
        predict = velocity(list(seen.values()), group > window)
        x = _noise(seeds, "noise", group, (c, group_size if group else 1, h, w), device)
        for step, (t, after) in enumerate(pairwise(times), start=1):
            x = x + (after - t) * predict(x, t)
            yield RolloutStep(number, len(sizes), step, len(times) - 1)
        remember(group, x)
        yield RolloutGroup(number, len(sizes), x[:, :, :wanted])


def _noise(seeds: Sequence[int], stream: str, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, *shape) normal numbers; row b is a pure function of (seeds[b], stream, group). Drawn on the CPU, so the same
    on every device."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, group)) for seed in seeds]).to(device)


def _velocity(
    transformer: LVDMTransformer3DModel,
    text: Tensor,
    text_mask: Tensor,
    seen: list[Tensor],                # the groups before that are in sight, re-noised
    far: bool,                         # from the clip's first latent: see `frame_positions`
    *,
    copies: int,                       # 2: the batch is conditional rows, then unconditional ones; 1: no guidance
    guidance_scale: float,
    guidance_rescale: float,
    history_noise: float,
    use_cache: bool,
) -> Callable[[Tensor, float], Tensor]:
    """The guided velocity of the group that follows `seen`, as a function of (x, t)."""
    seen = [group.repeat(copies, 1, 1, 1, 1) for group in seen]
    groups = tuple(group.shape[2] for group in seen)
    past, history = sum(groups), None
    group_size = transformer.config.group_size
    levels = text.new_full((text.shape[0], past), history_noise, dtype=torch.float32)
    if seen and use_cache:
        history = transformer(torch.cat(seen, dim=2), levels, text, text_mask, groups=groups,
                              positions=frame_positions(past, group_size, far), return_history=True).history
        seen, groups, levels = [], (), levels[:, :0]

    def predict(x: Tensor, t: float) -> Tensor:
        new = x.shape[2]
        at = torch.cat([levels, levels.new_full((levels.shape[0], new), t)], dim=1)
        positions = frame_positions(past + new, group_size, far)[-at.shape[1]:]
        v = transformer(torch.cat([*seen, x.repeat(copies, 1, 1, 1, 1)], dim=2), at, text, text_mask,
                        groups=(*groups, new), positions=positions, history=history).sample[:, :, -new:].float()
        if copies == 1:
            return v
        cond, null = v.chunk(2)
        return rescale_guidance(x, t, cond, torch.lerp(null, cond, guidance_scale), guidance_rescale)

    return predict
