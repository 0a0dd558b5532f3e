"""What one video is made from: everything that decides it beside the weights. Read from files of prompts, kept in what
is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from odvae.utils.config import Config, override
from odvae.utils.errors import UserError

from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_NOISE, STEPS, WINDOW
from .prompts import parse_schedule


class GenerationParams(Config):
    prompt: str = ""
    sections: tuple[tuple[float, str], ...] = ()  # (from this second on, prompt) after the first
    negative_prompt: str = ""
    seed: int = 0
    frames: int = Field(81, ge=1)  # of the whole result, 1 + 4k
    height: int | None = None  # pixels; None: the transformer's
    width: int | None = None
    frame_rate: float | None = Field(None, gt=0)  # frames a second; None: the transformer's
    scheduler: Literal["euler", "heun", "unipc", "dpm"] | None = None  # None: the pipeline's
    steps: int = Field(STEPS, ge=1)  # of the scheduler, a group of latents
    guidance_scale: float = GUIDANCE_SCALE
    guidance_rescale: float = Field(GUIDANCE_RESCALE, ge=0, le=1)
    shift: float | None = Field(None, gt=0)  # None: by size
    window: int = Field(WINDOW, ge=1)
    history_noise: float = Field(HISTORY_NOISE, ge=0, lt=1)
    scale: int = Field(1, ge=1)  # whole-number enlargement of the written pixels
    beginning: str = ""  # the file that it goes on from: name and SHA-256

    @field_validator("sections")
    @classmethod
    def _in_order(cls, value: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
        parse_schedule(((0.0, ""), *value))
        return value

    @property
    def prompts(self) -> tuple[tuple[float, str], ...]:
        """All sections."""
        return ((0.0, self.prompt), *self.sections)

    @property
    def batch_key(self) -> GenerationParams:
        """What videos that are made together have in common."""
        return self.model_copy(update={"prompt": "", "sections": (), "negative_prompt": "", "seed": 0})


def read_prompts(path: Path, base: GenerationParams, alike: bool = False) -> list[GenerationParams]:
    """The videos that a file asks for: a line of text each, or of JSON with any of `GenerationParams` (name.jsonl).
    Empty lines count for nothing. Where a line says no seed, it is that of `base` and the number of the line, from 0.

    Args:
        alike: they are to be made together: only prompts and seeds may be their own.

    Raises:
        UserError: the file cannot be read or asks for nothing; a line is not JSON, or has unknown or wrong values.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028 and other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {getattr(error, 'strerror', None) or error}") from error
    found: list[GenerationParams] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            values = _line(line, f"{path}, line {number}") if path.suffix == ".jsonl" else {"prompt": line.strip()}
            one = override(base, {"seed": base.seed + len(found), **values}, f"{path}, line {number}")
            if alike and one.batch_key != base.batch_key:
                own = [name for name in values if getattr(one.batch_key, name) != getattr(base.batch_key, name)]
                raise UserError(f"{path}, line {number}: all videos are made alike here; leave {', '.join(own)} out")
            found.append(one)
    if not found:
        raise UserError(f"{path} holds no prompts; write one a line, or a JSON object a line (.jsonl)")
    return found


def _line(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise UserError(f"{where}: expected an object with \"prompt\", e.g. {{\"prompt\": \"a red circle\"}}")
    return values
