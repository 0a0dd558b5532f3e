"""Autoregressive rollout of a video, group by group, each on a sliding window of clean history: constant cost at any
length.

A group starts as noise and a scheduler of diffusers denoises it; a flow map also takes where each step leads. The group
attends to the clip's first latent (the attention sink, which defines the content of the video) and to the last
`history_groups` groups. This history is lightly re-noised, which lowers drift (SkyReels-V2, 2504.13074), passes through
the transformer once, and serves all steps as cached keys and values. Positions (`frame_positions`) stay inside the
trained range.

With `history_follow` the history is noised anew at every step, to a share of the level that the group is at, so that a
group takes from it no more detail than it has itself, and fewer errors (HiAR, 2603.08703). Keys and values then serve
one step only: the history passes through with the group, and a step takes as many tokens as both.

With `sink_period` the sink rolls on, as a sink that stays shows ever less of what the video has become (Rolling Sink,
2602.07775, for models whose window is longer): every so many groups the last latent of the group that leaves the window
takes its place, as it was noised.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from odvae.utils.errors import UserError
from odvae.utils.finite import FiniteChecks, is_finite, non_finite
from odvae.utils.seeding import generator

from ..condition import Condition
from ..flow import guide, interpolate, rescale_guidance, resolution_shift, timesteps_schedule
from ..model.groups import frame_positions, group_sizes
from ..model.transformer import History, LVDMTransformer3DModel
from .outputs import RolloutGroup, RolloutStep
from .rollout_params import RolloutParams
from .schedulers import Solver, num_function_evaluations


def group_layout(latents: int, given: int, group_size: int) -> tuple[int, ...]:
    """Split `latents` latent frames, of which the first `given` are context and not generated, into groups.

    The context is split from its end, the clip's first latent alone, so that generated groups continue whole groups; a
    partial group comes second and leaves the window first. (8, 4, 2) -> (1, 1, 2, 2, 2); (8, 0, 2) ->
    (1, 2, 2, 2, 1)."""
    if not given:
        return group_sizes(latents, group_size)
    context = (1, *reversed(group_sizes(given, group_size)[1:]))
    return context if given == latents else (*context, *group_sizes(latents - given, group_size, first_alone=False))


def rollout(transformer: LVDMTransformer3DModel, condition: Condition | Callable[[int], Condition], null: Condition,
            *, latents: int, height: int, width: int, seeds: Sequence[int], scheduler: Any = None,
            initial: Tensor | None = None, device: torch.device | None = None, **params: Any) -> Rollout:
    """Return a `Rollout` with `params`, fields of `RolloutParams`; invalid ones raise at once."""
    return Rollout(transformer, condition, null, RolloutParams(**params), latents=latents, height=height, width=width,
                   seeds=seeds, scheduler=scheduler, initial=initial, device=device)


_Past = tuple[Tensor, Tensor]  # a group's clean latents (B, c, t, h, w), and what they are noised with


@dataclass(frozen=True)
class _Context:
    """The history that a group attends to: as keys and values, or as latents that pass through at every step."""

    groups: list[_Past]                # empty if they are in `history`
    history: History | None
    frames: int                        # latent frames of the history


class Rollout:
    """A video's latents, group by group; iterating yields after every step and after every group.

    Whole groups are generated and the last one is truncated, so a short video is the beginning of a longer one, and
    batch composition does not matter. `initial` is split by `group_layout`; if it consists of whole groups, it is
    continued exactly as if this rollout had generated it.

    Attributes:
        on_step: called after every step with (number of the step, from 0; noise level; latents of the group); returns
            the latents to go on with.
        guidance_scale: of the next step; it may be changed meanwhile.
        interrupted: set it to end the group at hand after its step and to start no other.

    Raises:
        UserError: in the constructor, for invalid counts or shapes, and for latents that are not finite.
        NonFiniteError: the transformer or the scheduler gave values that are not finite; on a GPU at the group's end.
    """

    def __init__(
        self,
        transformer: LVDMTransformer3DModel,
        condition: Condition | Callable[[int], Condition],  # of B samples; or that of the group with this first latent
        null: Condition,               # of B samples or 1, to guide away from: usually that of ""
        params: RolloutParams,
        *,
        latents: int,                  # latent frames to generate, besides `initial`
        height: int,                   # of the latents
        width: int,
        seeds: Sequence[int],          # one per sample: the noise of group g is a pure function of (seed, g)
        scheduler: Any = None,         # see `schedulers.Solver`; None: Euler
        initial: Tensor | None = None,  # (B, c, T0, h, w) clean latents from a clip's first on, to continue
        device: torch.device | None = None,  # None: the transformer's
        noise: Tensor | None = None,   # (B, c, latents, h, w) to start from, in place of what the seeds give
        attention_kwargs: dict[str, Any] | None = None,  # of the transformer
    ) -> None:
        if latents < 1:
            raise UserError(f"latents must be at least 1, got {latents}")
        config = transformer.config
        self.transformer, self.params, self.seeds = transformer, params, list(seeds)
        self.device = device or transformer.device
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.shape = (config.in_channels, height, width)
        self.group_size: int = config.group_size
        tokens = self.group_size * height * width // config.patch_size**2
        self.shift = resolution_shift(tokens) if params.shift is None else params.shift
        self._condition_at = condition if callable(condition) else lambda first: condition
        self.null = null.select([0] * len(self.seeds)) if _num_samples(null) == 1 else null
        # With guidance a batch is the conditional samples followed by the unconditional ones, unless it is learned in.
        self.copies = 2 if params.guidance_scale != 1 and null.arguments and not config.guidance_embeds else 1
        self.guidance_scale, self.attention_kwargs = params.guidance_scale, attention_kwargs
        self.on_step: Callable[[int, float, Tensor], Tensor] = lambda number, sigma, x: x
        self.interrupted, self._checks = False, FiniteChecks()
        self.initial = [] if initial is None else self._initial_groups(initial)
        self.sizes = group_sizes(latents, self.group_size, first_alone=not self.initial)
        self._use_condition(self._condition_at(0))  # check it now
        self.noise = noise
        if noise is not None and noise.shape != (expected := (len(self.seeds), self.shape[0], latents, height, width)):
            raise UserError(f"latents, the noise to start from, must be {expected}, got {tuple(noise.shape)}")
        # The first and the last `history_groups` groups, each with one noise: all that attend to a group see the same.
        self.past: dict[int, _Past] = {}

    @torch.no_grad()
    def __iter__(self) -> Iterator[RolloutStep | RolloutGroup]:
        first = self.prefill()
        for number, size in enumerate(self.sizes, start=1):
            x = yield from self.denoise_group(number, first)
            self._add_history(len(self.initial) + number - 1, x)
            yield RolloutGroup(number, len(self.sizes), x[:, :, :size])
            first += x.shape[2]
            if self.interrupted:
                return

    @property
    def num_evaluations(self) -> int:
        """How often the transformer is evaluated, besides once per group for the history."""
        steps = self.params.num_inference_steps if self.params.sigmas is None else len(self.params.sigmas)
        return len(self.sizes) * num_function_evaluations(self.scheduler, steps)

    def prefill(self) -> int:
        """Take the initial groups as history; return the number of their latent frames."""
        self.past.clear()
        for group, clean in enumerate(self.initial):
            in_window = group >= len(self.initial) - self.params.history_groups
            if group == 0 or in_window or self.params.sink_period:
                self._add_history(group, clean)
        return sum(clean.shape[2] for clean in self.initial)

    def denoise_group(self, number: int, first: int) -> Generator[RolloutStep, None, Tensor]:
        """Denoise generated group `number` (from 1), whose first latent frame is `first`; yield after every step and
        return its clean latents (B, c, group_size, h, w), for a clip's first group (B, c, 1, h, w)."""
        group = len(self.initial) + number - 1
        far = group > self.params.history_groups
        self._use_condition(self._condition_at(first))
        context = self._context(far)
        x = self._start(number, group)
        solver = Solver(self.scheduler, self._sigmas(), self.seeds, group)
        for index, (t, target) in enumerate(zip(solver.sigmas, solver.targets, strict=True)):
            v = self._velocity(x, t, target, context, far)
            estimate = x - t * v
            x = solver.step(index, x, v)
            self._checks.add(x, lambda _: non_finite("guidance, or the scheduler's step after it,"))
            x = self.on_step((number - 1) * len(solver.sigmas) + index, t, x)
            yield RolloutStep(number, len(self.sizes), index + 1, len(solver.sigmas),
                              estimate[:, :, :self.sizes[number - 1]])
            if self.interrupted:
                break
        self._checks.settle()
        return x

    def _sigmas(self) -> Tensor:
        """The noise levels of the steps, and 0."""
        if self.params.sigmas is not None:
            return torch.tensor([*self.params.sigmas, 0.0])
        return timesteps_schedule(self.params.num_inference_steps, self.shift)

    def _start(self, number: int, group: int) -> Tensor:
        """The noise that a group (`number` of the generated ones, `group` of all) starts from."""
        c, h, w = self.shape
        x = _noise(self.seeds, "noise", group, (c, self.group_size if group else 1, h, w), self.device)
        if self.noise is not None:
            given = self.noise.split(self.sizes, dim=2)[number - 1]
            x[:, :, :given.shape[2]] = given
        return x

    def _context(self, far: bool) -> _Context:
        """The history of the next group; with the cache, as keys and values of one pass through the transformer."""
        groups = list(self.past.values())
        sizes = tuple(clean.shape[2] for clean, _ in groups)
        if not groups or not self.params.use_cache or self.params.history_follow:
            return _Context(groups, None, sum(sizes))
        level = self.params.history_noise
        latents = torch.cat([self._noised(past, level) for past in groups], dim=2)
        timestep = latents.new_full((len(latents), sum(sizes)), level)
        positions = frame_positions(sum(sizes), self.group_size, far)
        out = self._evaluate(latents, timestep, groups=sizes, positions=positions, return_history=True)
        return _Context([], out.history, sum(sizes))

    def _noised(self, past: _Past, level: float) -> Tensor:
        """A group of the history at a noise level, (copies * B, c, t, h, w)."""
        levels = torch.full((len(self.seeds),), level, device=self.device)
        return interpolate(*past, levels).repeat(self.copies, 1, 1, 1, 1)

    def _velocity(self, x: Tensor, t: float, target: float, context: _Context, far: bool) -> Tensor:
        """Predict the guided velocity of a group x (B, c, t, h, w) at noise level t; by a flow map its average from
        there to the level `target`. The history stays where it is."""
        sizes = (*(clean.shape[2] for clean, _ in context.groups), x.shape[2])
        level = max(self.params.history_noise, self.params.history_follow * t)  # of the history
        timestep = x.new_full((len(x) * self.copies, sum(sizes)), t)
        timestep[:, :-x.shape[2]] = level
        positions = frame_positions(context.frames + x.shape[2], self.group_size, far)[-sum(sizes):]
        history = [self._noised(past, level) for past in context.groups]
        latents = torch.cat([*history, x.repeat(self.copies, 1, 1, 1, 1)], dim=2)
        toward = {}
        if self.transformer.config.flow_map:
            toward["target_timestep"] = timestep.clone()
            toward["target_timestep"][:, -x.shape[2]:] = target
        v = self._evaluate(latents, timestep, **toward, groups=sizes, positions=positions,
                           history=context.history).sample
        v = v[:, :, -x.shape[2]:].float()
        scale = self.guidance_scale
        self._checks.add(v, lambda largest: non_finite(
            "the transformer", self.transformer, f"at noise level {t:.3g}, with guidance_scale={scale:g}, for values "
            f"of up to {largest:.3g}"), x)
        if self.copies == 1:
            return v
        cond, null = v.chunk(2)
        guided, reference = guide(null, cond, scale)
        return rescale_guidance(x, t, reference, guided, self.params.guidance_rescale)

    def _add_history(self, group: int, clean: Tensor) -> None:
        noise = _noise(self.seeds, "history", group, clean.shape[1:], self.device)
        self.past[group] = clean.to(self.device), noise
        leaving, period = group - self.params.history_groups, self.params.sink_period
        left = self.past.pop(leaving, None) if leaving > 0 else None
        if left is not None and period and leaving % period == 0:
            clean, noise = (latents[:, :, -1:] for latents in left)
            self.past[0] = clean, noise

    def _evaluate(self, latents: Tensor, timestep: Tensor, **layout: Any) -> Any:
        """Evaluate the transformer on the condition at hand."""
        if self.transformer.config.guidance_embeds:
            layout["guidance"] = timestep.new_full((len(timestep),), self.guidance_scale)
        return self.transformer(latents, timestep, **self._arguments, frame_rate=self.params.frame_rate,
                                attention_kwargs=self.attention_kwargs, **layout)

    def replace_condition(self, condition: Condition, null: Condition) -> None:
        """Condition all further steps, of this group and of later ones, on these. The history that this group attends
        to stays as it is."""
        self._condition_at, self.null = lambda first: condition, null
        self._use_condition(condition)

    def _use_condition(self, condition: Condition) -> None:
        """Condition the next steps, the whole batch including guidance."""
        if _num_samples(condition) not in (len(self.seeds), None):
            raise UserError(f"{len(self.seeds)} seeds for conditions of {_num_samples(condition)} samples; "
                            f"give one per sample")
        self.condition = condition
        self._arguments = (condition.concat(self.null) if self.copies == 2 else condition).to(self.device).arguments

    def _initial_groups(self, initial: Tensor) -> list[Tensor]:
        """Check the initial latents and split them by `group_layout`."""
        expected = (len(self.seeds), *self.shape)  # B, c, h, w
        if initial.ndim != 5 or not initial.shape[2] or (*initial.shape[:2], *initial.shape[3:]) != expected:
            raise UserError(f"video_latents must be (B, c, T, h, w) = {(*expected[:2], 'T', *expected[2:])}, "
                            f"got {tuple(initial.shape)}")
        if not is_finite(initial):
            raise UserError("video_latents contain NaN or infinity; generate them again")
        length = initial.shape[2]
        return list(initial.float().split(group_layout(length, length, self.group_size), dim=2))


def _num_samples(condition: Condition) -> int | None:
    """Samples of a condition; None for an unconditional model."""
    return next((len(value) for value in condition.arguments.values()), None)


def _noise(seeds: Sequence[int], stream: str, group: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw (B, *shape) normal numbers; sample b is a pure function of (seeds[b], stream, group). Drawn on the CPU, so
    the same on every device."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, group)) for seed in seeds]).to(device)
