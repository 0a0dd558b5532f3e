"""Generate a video: from text, from a picture, from the end of a video, or as a longer version of a generated one.

Each group of latents is stored as soon as it is sampled (`lvdm.generation.latent_store.LatentChunks`), so a job that is
interrupted, even by kill -9, samples nothing twice: the stored groups are decoded again, to the same pixels, and the
next group follows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from app.storage.jobs import Job, JobKind
from app.tasks.context import Services
from app.tasks.loras import MAX_LORAS, LoraChoice, check_loras
from app.tasks.pipeline_spec import PipelineSpec, load_pipeline_spec
from app.tasks.validation import MaybeID, checked
from lvdm.sampling.params import GenerationParams, VideoFileParams, check_supported
from odvae.utils.errors import UserError

DEFAULT_PIPELINE = "own"  # the pipeline of the app's configuration
MAX_SEED = 2**32 - 1
MAX_TEXT = 2000  # characters
MAX_SECTIONS = 32


class GenerateParams(GenerationParams):
    """The parameters of a video. `validate` fills in those that are left open."""

    model_config = ConfigDict(str_strip_whitespace=True, str_max_length=MAX_TEXT)

    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="the same seed gives the same video; -1 draws one")
    num_frames: int | None = Field(None, ge=1, description="default: from `seconds`")  # type: ignore[assignment]
    seconds: float | None = Field(None, gt=0, description="length of the whole video, if `num_frames` is not given; "
                                                          "default: the pipeline's")
    upload: MaybeID = Field("", description="id of an uploaded picture or video to continue")
    job: MaybeID = Field("", description="id of a generated video to continue")
    pipeline: str = Field("", max_length=64, description="id of a pipeline; default: that of the settings")
    loras: tuple[LoraChoice, ...] = Field((), max_length=MAX_LORAS, 
                                          description="LoRAs: of each the id of an asset, and its weight")
    tile: int | None = Field(None, ge=64, le=4096, description="pixels a side of decoding tiles; default: what fits")

    @field_validator("seed", mode="before")
    @classmethod
    def _empty_is_random(cls, seed: Any) -> Any:
        return -1 if seed is None or (isinstance(seed, str) and not seed.strip()) else seed

    @field_validator("negative_prompt", "prompt", "pipeline", "upload", "job", mode="before")
    @classmethod
    def _none_is_empty(cls, text: Any) -> Any:
        return "" if text is None else text

    def file_params(self) -> VideoFileParams:
        """Return the parameters that files store, as `lvdm generate` writes them."""
        return VideoFileParams(**{name: getattr(self, name) for name in GenerationParams.model_fields})


def pipeline_folder(pipeline: str, services: Services) -> Path | None:
    """Return the folder of `GenerateParams.pipeline`; None: the shipped pipeline."""
    selected = pipeline or _selected_pipeline(services)
    return services.config.pipeline if selected == DEFAULT_PIPELINE else services.assets.find(selected, "pipeline")


def _selected_pipeline(services: Services) -> str:
    return str((services.store.get_value("options") or {}).get("pipeline") or DEFAULT_PIPELINE)


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """Validate the parameters and fill in the defaults; return them with the job's title.

    Raises:
        UserError: a value does not fit the model or this server.
    """
    params = checked(GenerateParams, raw)
    params, context_frames = _with_source(params, services, owner)
    folder = pipeline_folder(params.pipeline, services)
    spec = load_pipeline_spec(folder)
    _check_supported(params, spec, services, owner)
    params = params.model_copy(update={
        "loras": check_loras(params.loras, folder, services.assets),
        # Resolved now: the settings may change before the job runs.
        "pipeline": params.pipeline or _selected_pipeline(services),
        "seed": secrets.randbelow(2**31) if params.seed == -1 else params.seed,
        "frame_rate": params.frame_rate or spec.frame_rate,
        "num_inference_steps": params.num_inference_steps or spec.num_inference_steps,
        "guidance_scale": spec.guidance_scale if params.guidance_scale is None else params.guidance_scale,
        "height": params.height or spec.height, "width": params.width or spec.width})
    _check_size(params, spec, services.config.max_side)
    params = _with_length(params, spec, services.config.max_seconds, context_frames)
    _check_prompts(params, spec)
    return params.model_dump(mode="json"), params.prompt or "no prompt"


def _check_supported(params: GenerateParams, spec: PipelineSpec, services: Services, owner: str) -> None:
    """Raise UserError if the pipeline cannot do what is requested."""
    sources = ["video"] if params.job else []
    if params.upload:
        sources.append("video" if services.uploads.find(params.upload, owner).kind == "video" else "image")
    check_supported(spec.kind, params.model_dump(include=set(GenerationParams.model_fields)), *sources,
                    able=spec.capabilities)


def _with_source(params: GenerateParams, services: Services, owner: str) -> tuple[GenerateParams, int]:
    """Return the parameters with those that follow from the source, and the source's number of frames."""
    if params.upload and params.job:
        raise UserError("Give a file or a video of the history to continue, not both.")
    if params.job:
        parent = source_job(params, services, owner)
        inherited = {name: parent.params[name] for name in ("height", "width", "frame_rate", "pipeline")}
        inherited["loras"] = _same_loras(params, parent)
        return params.model_copy(update=inherited), int(parent.result["frames"])
    if not params.upload:
        return params, 0
    spec = load_pipeline_spec(pipeline_folder(params.pipeline, services))
    upload = services.uploads.find(params.upload, owner)
    if params.height is None and params.width is None:
        params = params.model_copy(update=_fitting_size(upload.width, upload.height, spec))
    if upload.kind != "video":
        return params, 0
    stride, rate = spec.temporal_compression, params.frame_rate or spec.frame_rate
    return params, 1 + stride * max(0, int(((upload.seconds or 0) * rate - 1) // stride))


def _same_loras(params: GenerateParams, parent: Job) -> tuple[LoraChoice, ...]:
    """Return the LoRAs of the video that is extended. Raises UserError if others are given."""
    own = tuple(LoraChoice(**choice) for choice in parent.params.get("loras") or ())
    given = {choice.id: choice.weight for choice in params.loras}
    if given and given != {choice.id: choice.weight for choice in own}:
        listed = ", ".join(f"{choice.name} {choice.weight:g}" for choice in own) or "none"
        raise UserError(f"loras: a video is extended with the LoRAs that it was generated with ({listed}).")
    return own


def _check_size(params: GenerateParams, spec: PipelineSpec, max_side: int) -> None:
    """Raise UserError unless both sides are valid multiples of at most `max_side` pixels."""
    if spec.fixed_size:
        spec.check_size(params.height or 0, params.width or 0)
    multiple = spec.size_multiple
    largest = max_side // multiple * multiple
    for name, side in ("height", params.height or 0), ("width", params.width or 0):
        if side % multiple or not multiple <= side <= max_side:
            raise UserError(f"{name}: must be a multiple of {multiple} up to {largest}, but {side} was given; the "
                            f"nearest is {min(largest, spec.nearest(side))}.")


def _with_length(params: GenerateParams, spec: PipelineSpec, max_seconds: float,
                 context_frames: int) -> GenerateParams:
    """Return the parameters with `num_frames` and `seconds`. `context_frames`: frames of the source."""
    rate = params.frame_rate or spec.frame_rate
    if params.seconds is None:
        params = params.model_copy(update={"seconds": min(max_seconds, spec.own_seconds(rate))})
    assert params.seconds is not None
    longest = spec.frames_for(max_seconds, rate)  # the nearest valid length may be a little longer
    if (params.num_frames is None and params.seconds > max_seconds) or (params.num_frames or 0) > longest:
        seconds = params.num_frames / rate if params.num_frames else params.seconds
        raise UserError(f"seconds: must be at most {max_seconds:g}, but {seconds:g} was given.")
    frames = params.num_frames or spec.frames_for(params.seconds, rate)
    if spec.nearest_frames(frames) != frames:
        raise UserError(f"num_frames: must be {spec.lengths}, but {frames} was given; the nearest is "
                        f"{spec.nearest_frames(frames)}.")
    if frames <= context_frames:
        raise UserError(f"seconds: must be more than the {context_frames / rate:.1f} s of the source, as this is the "
                        f"length of the whole video.")
    return params.model_copy(update={"num_frames": frames, "seconds": round(frames / rate, 3)})


def _check_prompts(params: GenerateParams, spec: PipelineSpec) -> None:
    assert params.seconds is not None
    if spec.text and not params.prompt:
        raise UserError("prompt: is empty. Describe the video in a few words.")
    if len(params.sections) > MAX_SECTIONS:
        raise UserError(f"sections: is too long, at most {MAX_SECTIONS} are allowed.")
    last = params.prompts[-1][0]
    if last >= params.seconds:
        raise UserError(f"sections: the last begins at second {last:g}, after the end of the video at "
                        f"{params.seconds:.1f} s. Make the video longer, or remove the section.")
    if spec.classes and not spec.text:
        for _, text in params.prompts:
            if text and text not in spec.classes:
                raise UserError(f"prompt: must be one of {', '.join(spec.classes[:20])}, not {text!r}.")


def source_job(params: GenerateParams, services: Services, owner: str) -> Job:
    """Return the job whose video is extended. Raises UserError if its latents are missing."""
    parent = services.job_files.find(params.job)
    if services.config.credentials and parent.owner != owner:
        raise UserError(f"There is no job {params.job} here.")
    if parent.kind is not JobKind.GENERATE or not (services.job_files.folder(parent) / "final.safetensors").is_file():
        raise UserError("Only a finished video with its latents can be extended. Wait until it is finished, or upload "
                        "the video instead.")
    return parent


def _fitting_size(width: int, height: int, spec: PipelineSpec) -> dict[str, int]:
    """Return a size with the model's area and the picture's aspect ratio."""
    scale = (spec.height * spec.width / (height * width)) ** 0.5
    return {"height": spec.nearest(round(height * scale)), "width": spec.nearest(round(width * scale))}
