"""Generation parameters: one schema for the command line, the app, prompt files and output files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator

from odvae.utils.config import Config, override
from odvae.utils.errors import UserError

from ..capabilities import PIPELINES, Capabilities
from ..defaults import GUIDANCE_RESCALE, HISTORY_GROUPS, HISTORY_NOISE, Scheduler
from .prompts import parse_schedule

PER_VIDEO = ("prompt", "sections", "negative_prompt", "seed")  # may differ within a batch
LATER = ("history_follow", "sink_period")  # parameters that files from before them lack


class GenerationParams(Config):
    """The parameters of one video. The app's form and HTTP schema, the options of the command line and the arguments of
    `LVDMPipeline.stream` follow from these fields: names, defaults, ranges and descriptions are defined only here."""

    prompt: str = Field("", description="what the video shows; for a class-conditional model, a class name")
    sections: tuple[tuple[float, str], ...] = Field((), description="[second, prompt] pairs: later prompts, in order")
    negative_prompt: str = Field("", description="what guidance leads away from")
    seed: int = Field(0, description="the same seed gives the same video")
    num_frames: int | None = Field(None, ge=1, description="length of the whole video, for most pipelines 1 + 4k; by "
                                                           "default the pipeline's")
    height: int | None = Field(None, ge=1, description="pixels; by default the model's")
    width: int | None = Field(None, ge=1, description="pixels; by default the model's")
    frame_rate: float | None = Field(None, gt=0, le=120, description="frames per second; by default the model's")
    scheduler: Scheduler | None = Field(None, description="by default the pipeline's")
    num_inference_steps: int | None = Field(
        None, ge=1, le=200, description="sampling steps for each group of latents; by default the pipeline's")
    guidance_scale: float | None = Field(None, ge=0, le=30, description="1: no guidance, at half the cost; by default "
                                                                        "the pipeline's")
    guidance_rescale: float = Field(GUIDANCE_RESCALE, ge=0, le=1,
                                    description="share of the contrast added by guidance that is removed again")
    shift: float | None = Field(None, gt=0, le=100, description="above 1: more steps at high noise; by default by size")
    history_groups: int = Field(HISTORY_GROUPS, ge=1, le=64,
                                description="past groups of latents that a group attends to")
    history_noise: float = Field(HISTORY_NOISE, ge=0, lt=1, description="noise level of these past groups")
    history_follow: float = Field(0.0, ge=0, le=1, description="share of its own noise level that a group sees them "
                                                               "at, where that is more; above 0 slower")
    sink_period: int = Field(0, ge=0, le=1000, description="groups after which a later latent takes the place of the "
                                                           "first one, which all groups attend to; 0: never")

    @field_validator("sections")
    @classmethod
    def _check_order(cls, value: tuple[tuple[float, str], ...]) -> tuple[tuple[float, str], ...]:
        parse_schedule(((0.0, ""), *value))
        return value

    @property
    def prompts(self) -> tuple[tuple[float, str], ...]:
        """The prompt schedule from second 0."""
        return ((0.0, self.prompt), *self.sections)

    @property
    def length(self) -> int:
        """`num_frames`, once the pipeline's own has been filled in."""
        assert self.num_frames is not None
        return self.num_frames

    @property
    def batch_key(self) -> Self:
        """What the videos of a batch have in common."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in PER_VIDEO})

    @property
    def stream_arguments(self) -> dict[str, Any]:
        """The arguments of `LVDMPipeline.stream` that the videos of a batch have in common."""
        return {name: getattr(self, name) for name in GenerationParams.model_fields if name not in PER_VIDEO}


def check_supported(kind: str, params: Mapping[str, Any], *sources: str, able: Capabilities | None = None) -> None:
    """Check that a pipeline of class `kind` can do what is requested.

    Args:
        params: parameters by name; those that it does not take must have their defaults.
        sources: what else is requested: "image", "video", "sections".
        able: the pipeline's capabilities; None: those of its class.

    Raises:
        UserError: it cannot; the message has the reason.
    """
    fields, able = GenerationParams.model_fields, able or PIPELINES[kind]
    for name, reason in able.unsupported.items():
        changed = name in fields and name in params and params[name] != fields[name].default
        if changed or name in sources:
            what = f"start from {'an' if name == 'image' else 'a'} {name}" if name in ("image", "video") \
                else f"use {name.replace('_', ' ')}"
            raise UserError(f"{name}: a {kind} cannot {what}: {reason}")
    scheduler, known = params.get("scheduler"), able.schedulers
    if isinstance(scheduler, str) and scheduler not in known:
        choice = " or ".join(filter(None, [", ".join(map(repr, known[:-1])), repr(known[-1])]))
        raise UserError(f"scheduler: must be {choice} with this {kind}, but {scheduler!r} was given")
    steps, least = params.get("num_inference_steps"), able.min_inference_steps
    if steps is not None and steps < least:
        raise UserError(f"num_inference_steps must be at least {least} with {kind}, got {steps}")


class VideoFileParams(GenerationParams):
    """The parameters of a video file, stored in it and with its latents."""

    scale: int = Field(1, ge=1, description="whole-number enlargement of the written pixels")
    source: str = Field("", description="the file that the video continues: its name and SHA-256")

    @property
    def identity(self) -> dict[str, Any]:
        """What a video's fingerprint is taken of: a parameter that came later counts where it is used, so that it
        changes no fingerprint of a file from before."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items()
                if name not in LATER or value != type(self).model_fields[name].default}


Params = TypeVar("Params", bound=GenerationParams)


def read_prompts(path: Path, base: Params, one_batch: bool = False) -> list[Params]:
    """Read a file of prompts: one per line, or in a .jsonl an object per line with any of the parameters.

    Empty lines are skipped. The default seed of a line is that of `base` plus the number of lines before it.

    Args:
        base: the parameters that a line does not give.
        one_batch: refuse lines that differ in more than prompts and seeds.

    Raises:
        UserError: the file cannot be read or is empty; a line is not JSON, or has unknown or invalid values.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may contain U+2028 and other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {getattr(error, 'strerror', None) or error}") from error
    videos: list[Params] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            values = _parse_line(line, where) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            video = override(base, {"seed": base.seed + len(videos), **values}, where)
            if one_batch and video.batch_key != base.batch_key:
                own = [name for name in values if getattr(video.batch_key, name) != getattr(base.batch_key, name)]
                raise UserError(f"{where}: only prompts and seeds may differ here; remove {', '.join(own)}")
            videos.append(video)
    if not videos:
        raise UserError(f"{path} contains no prompts; write one per line, or a JSON object per line (.jsonl)")
    return videos


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise UserError(f"{where}: expected an object with \"prompt\", e.g. {{\"prompt\": \"a red circle\"}}")
    return values
