"""What a user may ask for, and what is really used.

A `Request` is what came in (from the page or over the API); `settle` turns it into `Params`, the values that are used:
the seed is drawn where none was given, and the length is put on the model's grid. Both are checked here, on the server,
whatever the page has checked before.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, field_validator

from lvdm.defaults import GUIDANCE_SCALE, STEPS
from odvae.runtime.errors import UserError

MAX_SEED = 2**32 - 1
MAX_STEPS = 100
MAX_GUIDANCE = 15.0
MAX_TEXT = 1000

Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_TEXT)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Guidance = Annotated[FiniteFloat, Field(ge=0, le=MAX_GUIDANCE)]


@dataclass(frozen=True)
class Grid:
    """The lengths that a model can make: 1 + stride * k frames, shown at `frame_rate` frames a second."""

    frame_rate: float = 8.0
    stride: int = 4

    def frames_for(self, seconds: float) -> int:
        """The valid number of frames nearest to `seconds`; never fewer than one."""
        return 1 + self.stride * max(0, round((seconds * self.frame_rate - 1) / self.stride))


class Params(BaseModel):
    """The settings that a video is made with: everything that is needed to make it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    frames: Annotated[int, Field(ge=1)]
    frame_rate: Annotated[FiniteFloat, Field(gt=0)]
    steps: Steps
    guidance: Guidance

    @property
    def seconds(self) -> float:
        """How long the video plays."""
        return self.frames / self.frame_rate

    def on(self, grid: Grid) -> Params:
        """The same settings on another grid: the playing time stays as near as the grid allows."""
        if grid.frame_rate == self.frame_rate and (self.frames - 1) % grid.stride == 0:
            return self
        return self.model_copy(update={"frames": grid.frames_for(self.seconds), "frame_rate": grid.frame_rate})


class Request(BaseModel):
    """What a user asks for. A seed of None, "" or -1 means: draw one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    seconds: Annotated[FiniteFloat, Field(gt=0)] = 4.0
    steps: Steps = STEPS
    guidance: Guidance = GUIDANCE_SCALE

    @field_validator("negative_prompt", mode="before")
    @classmethod
    def _nothing_is_empty(cls, text: Any) -> Any:
        return "" if text is None else text

    @field_validator("seed", mode="before")
    @classmethod
    def _empty_is_random(cls, seed: Any) -> Any:
        return -1 if seed is None or (isinstance(seed, str) and not seed.strip()) else seed

    def settle(self, grid: Grid, max_seconds: float) -> Params:
        """The values that will be used. Raises UserError where the length is beyond what this server makes."""
        if self.seconds > max_seconds:
            raise UserError(f"seconds: at most {max_seconds:g} here, but {self.seconds:g} was asked. Ask for less.")
        return Params(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=secrets.randbelow(2**31) if self.seed == -1 else self.seed,
            frames=grid.frames_for(self.seconds),
            frame_rate=grid.frame_rate,
            steps=self.steps,
            guidance=self.guidance,
        )


def read_request(raw: Mapping[str, Any]) -> Request:
    """Check what came in. Raises UserError with one clear line for each thing that is wrong."""
    try:
        return Request.model_validate(dict(raw))
    except ValidationError as error:
        raise UserError(" ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "settings"
    given, context = item["input"], item.get("ctx", {})
    if field == "prompt" and item["type"] in ("string_too_short", "missing"):
        return "prompt: is empty. Describe the video in a few words."
    match item["type"]:
        case "string_too_long":
            return f"{field}: is {len(given)} characters long, at most {context['max_length']} are allowed."
        case "greater_than_equal" | "less_than_equal" | "greater_than":
            bound = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "more than"}
            limit = context.get("ge", context.get("le", context.get("gt")))
            return f"{field}: must be {bound[item['type']]} {limit}, but {given!r} was given."
        case "extra_forbidden":
            return f"{field}: there is no such setting."
        case "int_from_float" | "int_parsing" | "int_type":
            return f"{field}: must be a whole number, but {given!r} was given."
        case "float_parsing" | "float_type" | "finite_number":
            return f"{field}: must be a number, but {given!r} was given."
        case _:
            return f"{field}: {item['msg'][0].lower()}{item['msg'][1:]}, but {given!r} was given."
