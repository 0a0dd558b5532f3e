"""The parameters of a rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from odvae.utils.errors import UserError

from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_GROUPS, HISTORY_NOISE, STEPS


@dataclass(frozen=True, kw_only=True)
class RolloutParams:
    """How groups are denoised. Raises UserError for a value out of range, including NaN."""

    num_inference_steps: int = STEPS   # of the scheduler, per group
    sigmas: Sequence[float] | None = None  # noise levels of the steps, descending in (0, 1], in place of their number
    guidance_scale: float = GUIDANCE_SCALE  # 1: no guidance, at half the cost (2207.12598), unless it is learned in
    guidance_rescale: float = GUIDANCE_RESCALE  # share of the contrast added by guidance that is removed again; of
    #                                             guidance that is learned in, the training decides it
    shift: float | None = None         # of the timesteps, `flow.timesteps_schedule`; None: `flow.resolution_shift`
    history_groups: int = HISTORY_GROUPS  # past groups that a group attends to, besides the first latent
    history_noise: float = HISTORY_NOISE  # noise level of that history, in [0, 1)
    history_follow: float = 0.0        # share, in [0, 1], of the group's own noise level that the history has at each
    #                                    step, where that is more: at 1 the level of the group (HiAR, 2603.08703)
    sink_period: int = 0               # groups after which a later latent takes the first one's place; 0: never
    frame_rate: float | None = None    # of the video; None: the transformer's
    use_cache: bool = True             # False: the history passes through at every step; the same values, slower

    def __post_init__(self) -> None:
        if self.sigmas is not None and not _descend(self.sigmas):
            raise UserError(f"sigmas must descend in (0, 1], got {list(self.sigmas)}; the final 0 is added to them")
        for name in "num_inference_steps", "history_groups":
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.history_noise < 1:
            raise UserError(f"history_noise must lie in [0, 1), got {self.history_noise}")
        if not 0 <= self.history_follow <= 1:
            raise UserError(f"history_follow must lie in [0, 1], got {self.history_follow}")
        if self.sink_period < 0:
            raise UserError(f"sink_period must be at least 0, got {self.sink_period}")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, got {self.guidance_scale}")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale must lie in [0, 1], got {self.guidance_rescale}")
        for name in "shift", "frame_rate":
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0 and finite, got {value}")


def _descend(sigmas: Sequence[float]) -> bool:
    return len(sigmas) > 0 and sigmas[0] <= 1 and sigmas[-1] > 0 and all(a > b for a, b in pairwise(sigmas))
