"""Make a video: from text, from a picture, from the end of a video, or longer than one that was made.

Each group of latents is kept as soon as it is sampled (`lvdm.generation.latent_store.LatentChunks`), so a job that was
broken off, even by kill -9, samples nothing twice: what is kept is decoded again, to the same pixels, and the next
group follows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, field_validator

from app.storage.jobs import Job, JobKind
from app.tasks.context import Services
from app.tasks.pipeline_spec import PipelineSpec, load_pipeline_spec
from app.tasks.validation import MaybeID, checked
from lvdm.defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_NOISE, STEPS, WINDOW
from odvae.utils.errors import UserError

if TYPE_CHECKING:
    from lvdm.sampling.params import GenerationParams

DEFAULT_PIPELINE = "own"  # the pipeline that the app was started with
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_TEXT = 2000
MAX_SECTIONS = 32

Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_TEXT)]
Second = Annotated[FiniteFloat, Field(ge=0)]
Place = Annotated[str, StringConstraints(max_length=64)]


class GenerateParams(BaseModel):
    """What a video is made from. As it comes in, much may be left open; `validate` fills it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text = ""
    sections: Annotated[tuple[tuple[Second, Text], ...], Field(max_length=MAX_SECTIONS)] = ()  # after the first
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1  # -1: draw one
    seconds: Annotated[FiniteFloat, Field(gt=0)] = 4.0  # of the whole result; `frames` goes before it
    frames: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=8)] | None = None  # pixels; None: the model's
    width: Annotated[int, Field(ge=8)] | None = None
    frame_rate: Annotated[FiniteFloat, Field(gt=0, le=120)] | None = None  # None: the model's
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = STEPS
    scheduler: Literal["euler", "heun", "unipc", "dpm"] | None = None
    guidance_scale: Annotated[FiniteFloat, Field(ge=0, le=MAX_GUIDANCE)] = GUIDANCE_SCALE
    guidance_rescale: Annotated[FiniteFloat, Field(ge=0, le=1)] = GUIDANCE_RESCALE
    shift: Annotated[FiniteFloat, Field(gt=0, le=100)] | None = None
    window: Annotated[int, Field(ge=1, le=64)] = WINDOW
    history_noise: Annotated[FiniteFloat, Field(ge=0, lt=1)] = HISTORY_NOISE
    upload: MaybeID = ""  # a picture or video to go on from
    job: MaybeID = ""  # a video that was made, to make longer
    pipeline: Place = ""  # of `places`, or `DEFAULT_PIPELINE`; "": that of the settings
    tile: Annotated[int, Field(ge=64, le=4096)] | None = None  # pixels a side to decode in; None: as fits the memory

    @field_validator("seed", mode="before")
    @classmethod
    def _empty_is_random(cls, seed: Any) -> Any:
        return -1 if seed is None or (isinstance(seed, str) and not seed.strip()) else seed

    @field_validator("negative_prompt", "prompt", "pipeline", "upload", "job", mode="before")
    @classmethod
    def _nothing_is_empty(cls, text: Any) -> Any:
        return "" if text is None else text

    @property
    def prompts(self) -> tuple[tuple[float, str], ...]:
        return ((0.0, self.prompt), *self.sections)

    def settings(self) -> GenerationParams:
        """As `lvdm generate` knows them, and as files carry them."""
        from lvdm.sampling.params import GenerationParams

        return GenerationParams(
            **{name: getattr(self, name) for name in GenerationParams.model_fields if hasattr(self, name)}
        )


def pipeline_folder(pipeline: str, services: Services) -> Path | None:
    """Of a place's id, see `GenerateParams.pipeline`; None: the one that ships."""
    chosen = pipeline or _of_settings(services)
    return services.config.pipeline if chosen == DEFAULT_PIPELINE else services.places.find(chosen, "pipeline")


def _of_settings(services: Services) -> str:
    return str((services.store.get_value("options") or {}).get("pipeline") or DEFAULT_PIPELINE)


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """Every value that will be used. Raises UserError for what does not fit the model or this server."""
    params = checked(GenerateParams, raw)
    card = load_pipeline_spec(pipeline_folder(params.pipeline, services))
    changes: dict[str, Any] = {"seed": secrets.randbelow(2**31)} if params.seed == -1 else {}
    given = 0
    if params.upload and params.job:
        raise UserError("Give a file or a video of the history to go on from, not both.")
    if params.job:
        parent = source_job(params, services, owner)
        before = parent.params
        given = int(parent.result["frames"])
        changes |= {name: before[name] for name in ("height", "width", "frame_rate", "pipeline")}
        card = load_pipeline_spec(pipeline_folder(before["pipeline"], services))
    elif params.upload:
        upload = services.uploads.find(params.upload, owner)
        if params.height is None and params.width is None:
            changes |= _fitting(upload.width, upload.height, card)
        if upload.kind == "video":
            rate = params.frame_rate or card.frame_rate
            given = 1 + card.temporal_compression * max(
                0, int(((upload.seconds or 0) * rate - 1) // card.temporal_compression)
            )
    # Named once and for all: the settings may change before its turn, or before it is made again.
    params = params.model_copy(update={"pipeline": params.pipeline or _of_settings(services), **changes})
    rate = params.frame_rate or card.frame_rate
    height, width = params.height or card.height, params.width or card.width
    for name, side in ("height", height), ("width", width):
        if side % card.size_multiple or not card.size_multiple <= side <= services.config.max_side:
            largest = services.config.max_side // card.size_multiple * card.size_multiple
            raise UserError(
                f"{name}: must be a multiple of {card.size_multiple} up to {largest}, but {side} was given; the "
                f"nearest is {min(largest, card.nearest(side))}."
            )
    longest = card.frames_for(services.config.max_seconds, rate)  # the grid may go a little beyond
    if (params.frames is None and params.seconds > services.config.max_seconds) or (params.frames or 0) > longest:
        asked = params.frames / rate if params.frames else params.seconds
        raise UserError(
            f"seconds: at most {services.config.max_seconds:g} here, but {asked:g} was asked. Ask for less."
        )
    frames = params.frames or card.frames_for(params.seconds, rate)
    if (frames - 1) % card.temporal_compression:
        raise UserError(f"frames: must be 1 + {card.temporal_compression}k, but {frames} was given; the nearest is "
                        f"{card.frames_for(frames, 1)}.")
    if frames <= given:
        raise UserError(f"seconds: what you go on from plays {given / rate:.1f} s already, and this is the length of "
                        f"the whole: ask for more than that.")
    _check_prompts(params, card, frames / rate)
    params = params.model_copy(update={"frames": frames, "seconds": round(frames / rate, 3), "frame_rate": rate,
                                       "height": height, "width": width})
    return params.model_dump(mode="json"), params.prompt or "no prompt"


def _check_prompts(params: GenerateParams, card: PipelineSpec, seconds: float) -> None:
    if card.text and not params.prompt:
        raise UserError("prompt: is empty. Describe the video in a few words.")
    begins = [second for second, _ in params.sections]
    if begins != sorted(set(begins)) or (begins and begins[0] <= 0):
        raise UserError("sections: each must begin later than the one before, the first after second 0.")
    if begins and begins[-1] >= seconds:
        raise UserError(f"sections: the last begins at second {begins[-1]:g}, when the video of {seconds:.1f} s is "
                        f"over. Ask for a longer video, or take the section out.")
    if card.classes and not card.text:
        for _, text in params.prompts:
            if text and text not in card.classes:
                raise UserError(f"prompt: this model makes {', '.join(card.classes[:20])}; {text!r} is none of them.")


def source_job(params: GenerateParams, services: Services, owner: str) -> Job:
    """The job that is made longer. Raises UserError where its latents are not there."""
    parent = services.library.find(params.job)
    if services.config.credentials and parent.owner != owner:
        raise UserError(f"There is no job {params.job} here.")
    if parent.kind is not JobKind.GENERATE or not (services.library.folder(parent) / "final.safetensors").is_file():
        raise UserError("Only a finished video that was generated here can be made longer; its latents are gone or "
                        "not there yet. Upload it instead.")
    return parent


def _fitting(width: int, height: int, card: PipelineSpec) -> dict[str, int]:
    """A size of the model's area and the picture's shape."""
    scale = (card.height * card.width / (height * width)) ** 0.5
    return {"height": card.nearest(round(height * scale)), "width": card.nearest(round(width * scale))}
