"""Convert the form's values to a job's params and back, and check them while the user types."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.storage.asset_scanner import Asset
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.context import Services
from app.tasks.estimate import Estimate, estimate
from app.tasks.generate import GenerateParams, pipeline_folder, source_job, validate
from app.tasks.pipeline_spec import DEFAULT_SECONDS, PipelineSpec, load_pipeline_spec
from app.ui.html.labels import count
from app.ui.html.templates import render
from app.ui.loras import find_loras
from lvdm.capabilities import PIPELINES
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes, format_duration

TEXT, FILE, HISTORY = "text only", "image or video", "video of the history"
DEFAULT_SIZE, CUSTOM = "", "custom"  # sizes beside WIDTHxHEIGHT

# The initial values of the form: those of the parameters, where "" leaves one open, and those of the form only.
DEFAULTS: dict[str, Any] = {
    **{name: "" if field.default is None else field.default for name, field in GenerateParams.model_fields.items()
       if name != "num_frames"},
    "num_inference_steps": PIPELINES["LVDMPipeline"].num_inference_steps,
    "guidance_scale": PIPELINES["LVDMPipeline"].guidance_scale,
    "seconds": DEFAULT_SECONDS, "sections": [], "loras": [], "seed": "",
    "start_from": TEXT, "size": DEFAULT_SIZE, "width": 64, "height": 64}
NAMES = tuple(DEFAULTS)
FILE_ONLY = {"adapters", "made_by", "notes", "scale", "source"}  # other settings of files


def to_params(values: Mapping[str, Any], unsupported: Collection[str] = ()) -> dict[str, Any]:
    """Return the form's values as params for `validate`, without empty fields, and without those that are hidden as
    the pipeline does not take them."""
    hidden = {"start_from", "size", "width", "height", *unsupported}
    raw = {name: value for name, value in values.items() if name not in hidden}
    raw = {name: value for name, value in raw.items() if not (isinstance(value, str) and not value.strip())}
    raw["sections"] = raw.get("sections") or []
    raw["loras"] = [lora for lora in raw.get("loras") or [] if lora]
    start_from = TEXT if starts_from_text(unsupported) else values["start_from"]
    for name, source in ("upload", FILE), ("job", HISTORY):
        if start_from != source:
            raw.pop(name, None)
    if start_from == FILE and not raw.get("upload"):
        raise UserError("Start from an image or video: upload a file, or choose text only.")
    if start_from == HISTORY and not raw.get("job"):
        raise UserError("Start from a video of the history: choose one, or choose text only.")
    size = str(values["size"] or DEFAULT_SIZE)
    if size == CUSTOM:
        raw |= {"width": values["width"], "height": values["height"]}
    elif size != DEFAULT_SIZE:
        width, _, height = size.partition("x")
        raw |= {"width": width, "height": height}
    return raw


def starts_from_text(unsupported: Collection[str]) -> bool:
    """Whether a pipeline can continue neither an image nor a video."""
    return {"image", "video"} <= set(unsupported)


def to_form(params: Mapping[str, Any], spec: PipelineSpec, max_side: int, seed: bool = True) -> dict[str, Any]:
    """Return a job's params, or the settings of a file, as values of the form, with defaults for missing ones.

    Args:
        seed: keep the seed; otherwise a new one is drawn.
    """
    own = {name: getattr(spec, name) for name in ("num_inference_steps", "guidance_scale")}
    values = {**DEFAULTS, **own, **{name: params[name] for name in NAMES if params.get(name) is not None}}
    values["sections"] = [[float(second), str(text)] for second, text in params.get("sections") or ()]
    values["loras"] = [dict(lora) for lora in params.get("loras") or ()]
    values["seed"] = str(params["seed"]) if seed and params.get("seed") is not None else ""
    for name in "frame_rate", "shift":
        values[name] = f"{params[name]:g}" if params.get(name) else ""
    if params.get("num_frames"):
        values["seconds"] = round(params["num_frames"] / (params.get("frame_rate") or spec.frame_rate), 3)
    values["start_from"] = FILE if params.get("upload") else HISTORY if params.get("job") else TEXT
    height, width = params.get("height"), params.get("width")
    if height and width:
        name = f"{width}x{height}"
        is_default = (height, width) == (spec.height, spec.width)
        named = {size for _, size in sizes(spec, max_side)}
        values["size"] = DEFAULT_SIZE if is_default else name if name in named else CUSTOM
    else:
        values["size"] = DEFAULT_SIZE
    return values


def from_draft(draft: Any, initial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the draft from the browser as values of the form; invalid ones are replaced by those in `initial`."""
    stored = draft if isinstance(draft, dict) else {}
    values = {name: stored[name] if _same_type(stored.get(name), value) else value for name, value in initial.items()}
    if values["start_from"] not in (TEXT, FILE, HISTORY):
        values["start_from"] = TEXT
    if not all(isinstance(section, list) and len(section) == 2 for section in values["sections"]):
        values["sections"] = []
    if not all(isinstance(lora, dict) and isinstance(lora.get("id"), str) for lora in values["loras"]):
        values["loras"] = []
    return values


def _same_type(new: Any, old: Any) -> bool:
    if isinstance(old, int | float):
        return isinstance(new, int | float) and math.isfinite(new)
    return isinstance(new, type(old))


SCHEDULERS = {"euler": "Euler", "heun": "Heun (two evaluations a step)", "unipc": "UniPC", "dpm": "DPM-Solver++",
              "euler-ancestral": "Euler ancestral", "ddim": "DDIM", "ddpm": "DDPM"}
CLASSES = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun",
           "UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpm", "EulerDiscreteScheduler": "euler",
           "EulerAncestralDiscreteScheduler": "euler-ancestral", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}


def schedulers(spec: PipelineSpec) -> list[tuple[str, str]]:
    """Return the pipeline's own scheduler and the others that it can be sampled with, as (label, value)."""
    own = SCHEDULERS.get(CLASSES.get(spec.scheduler, ""), spec.scheduler)
    others = [(SCHEDULERS[name], name) for name in spec.schedulers]
    return [(f"{own} (default)" if own else "the pipeline's", ""), *others]


def sizes(spec: PipelineSpec, max_side: int) -> list[tuple[str, str]]:
    """Return sizes as (label, value): the model's own, larger ones, other aspect ratios."""
    labels = {DEFAULT_SIZE: f"{spec.width}x{spec.height}, the model's"}
    if spec.fixed_size:
        return [(label, value) for value, label in labels.items()]
    wide = math.sqrt(16 / 9)
    for label, across, down in (("1.5 times", 1.5, 1.5), ("twice", 2, 2), ("wide", wide, 1 / wide),
                                ("tall", 1 / wide, wide), ("wide, large", 1.5 * wide, 1.5 / wide)):  # fmt: skip
        width, height = spec.nearest(round(spec.width * across)), spec.nearest(round(spec.height * down))
        if max(width, height) <= max_side and (width, height) != (spec.width, spec.height):
            labels.setdefault(f"{width}x{height}", f"{width}x{height}, {label}")
    return [(label, value) for value, label in labels.items()] + [("custom ...", CUSTOM)]


@dataclass(frozen=True)
class CheckedForm:
    """The validated params of a form, and their estimated cost."""

    params: GenerateParams
    spec: PipelineSpec
    estimate: Estimate


def check_form(values: Mapping[str, Any], services: Services, owner: str) -> CheckedForm:
    """Validate the form without queueing a job. Raises UserError."""
    chosen = load_pipeline_spec(pipeline_folder(str(values["pipeline"] or ""), services))
    raw = to_params(values, chosen.unsupported)
    params = GenerateParams.model_validate(validate(raw, services, owner)[0])
    folder = pipeline_folder(params.pipeline, services)
    spec = load_pipeline_spec(folder)
    context_frames = _context_frames(params, spec, services, owner)
    return CheckedForm(params, spec, estimate(params, spec, folder, services.store.get_value, context_frames))


def _context_frames(params: GenerateParams, spec: PipelineSpec, services: Services, owner: str) -> int:
    """Return the number of frames of the source."""
    if params.job:
        return int(source_job(params, services, owner).result["frames"])
    if params.upload:
        upload = services.uploads.find(params.upload, owner)
        if upload.kind == "video" and upload.seconds:
            steps = int((upload.seconds * (params.frame_rate or spec.frame_rate) - 1) // spec.temporal_compression)
            return 1 + spec.temporal_compression * max(0, steps)
        return 1
    return 0


def hint(values: Mapping[str, Any], services: Services, owner: str) -> str:
    """Return a summary of the form, or what is invalid in it, as HTML."""
    try:
        # An empty prompt is not an error yet.
        checked = check_form({**values, "prompt": str(values["prompt"] or "").strip() or "a"}, services, owner)
    except UserError as error:
        return render("form.html", "invalid", error)
    p, cost = checked.params, checked.estimate
    assert p.num_frames is not None and p.frame_rate is not None
    costs = ["no measurements from this machine yet" if cost.seconds is None else
            f"about {format_duration(max(1, cost.seconds))}"]  # fmt: skip
    costs += [f"{format_bytes(cost.bytes)} of memory"] if cost.bytes is not None else []
    video = (f"{count(p.num_frames, 'frame')} on the model's grid ({checked.spec.lengths.replace(' ', '')}), plays "
             f"{p.num_frames / p.frame_rate:.1f} s at {p.frame_rate:g} fps, {p.width}x{p.height}")  # fmt: skip
    return render("form.html", "hint", video, costs)


def from_metadata(
    settings: Mapping[str, Any], spec: PipelineSpec, max_side: int, seed: bool, loras: Sequence[Asset] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a file as values of the form, and notes on those that could not be used.

    Args:
        loras: those here, in which the file's are looked up by name.
    """
    known = {name: value for name, value in settings.items() if name in GenerateParams.model_fields}
    for name in "upload", "job", "pipeline", "loras":  # ids of another app
        known.pop(name, None)
    try:
        params = GenerateParams.model_validate({name: value for name, value in known.items() if value is not None})
    except ValueError:
        known, invalid = _split_valid(known)
        params = GenerateParams.model_validate(known)
    else:
        invalid = []
    unknown = sorted(str(name)[:40] for name in set(settings) - set(GenerateParams.model_fields) - FILE_ONLY)
    notes = [f"Ignored unknown settings: {', '.join(unknown[:8])}."] if unknown else []
    notes += [f"Ignored invalid settings: {', '.join(invalid)}."] if invalid else []
    if settings.get("source"):
        notes.append(f"The video starts from {str(settings['source'])[:120]}: upload this file again.")
    chosen, missing = find_loras(settings.get("adapters"), loras)
    if missing:
        notes.append(f"These LoRAs of the video are not here: {', '.join(missing)}.")
    values = {name: getattr(params, name) for name in known} | {"loras": chosen}
    return to_form(values, spec, max_side, seed), notes


def _split_valid(known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that are valid by themselves, and the names of the others."""
    good, bad = {}, []
    for name, value in known.items():
        try:
            GenerateParams.model_validate({name: value})
        except (ValueError, TypeError, RecursionError):
            bad.append(name)
        else:
            good[name] = value
    return good, bad


def video_choices(jobs: list[Job]) -> list[tuple[str, str]]:
    """Return the videos of the history that can be extended as (label, id)."""
    return [
        (f"{job.title[:60]} ({job.result.get('seconds', 0):.1f} s)", job.id)
        for job in jobs
        if job.kind is JobKind.GENERATE and job.state in (JobState.DONE, JobState.STOPPED) and job.result.get("final")
        and job.result.get("extendable", True)
    ]
