"""What every loss term that is switched on has: a weight, a step where it starts, and a linear ramp to that weight."""

from __future__ import annotations

from pydantic import Field

from ..utils.config import Config


class TermConfig(Config):
    weight: float = Field(0.0, ge=0)  # 0: without this term
    start: int = Field(0, ge=0)  # steps without it, counted from the first step that a stage gives it a weight
    ramp: int = Field(0, ge=0)  # steps from 0 to the weight

    def at(self, step: int) -> float:
        """The weight `step` steps (from 0) after the count begins: 0 up to `start`, then w/ramp, 2w/ramp ... w."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / max(1, self.ramp))
