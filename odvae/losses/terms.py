"""The schedule of an optional loss term: a weight, a start step, and a linear ramp to that weight."""

from __future__ import annotations

from pydantic import Field

from ..utils.config import Config


class TermConfig(Config):
    weight: float = Field(0.0, ge=0)  # 0: off
    start: int = Field(0, ge=0)  # steps without it, counted from the first step of the stage that gives it a weight
    ramp: int = Field(0, ge=0)  # steps from 0 to the weight

    def weight_at(self, step: int) -> float:
        """Return the weight at a step counted from 0: 0 up to `start`, then w/ramp, 2w/ramp ... w."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / max(1, self.ramp))
