"""Convert the form's values to a job's params and back, and check them while they are typed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.storage.jobs import Job, JobKind, JobState
from app.tasks.context import Services
from app.tasks.estimate import Estimate, estimate
from app.tasks.generate import GenerateParams, pipeline_folder, source_job, validate
from app.tasks.pipeline_spec import PipelineSpec, load_pipeline_spec
from app.ui.html.labels import count
from app.ui.html.templates import render
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes, format_duration

TEXT, FILE, HISTORY = "text only", "image or video", "video of the history"
OWN, CUSTOM = "", "custom"  # sizes beside those that name one

# The form's values, as they are at first: those of the parameters, where "" leaves one open, and the form's own.
DEFAULTS: dict[str, Any] = {
    **{name: "" if field.default is None else field.default for name, field in GenerateParams.model_fields.items()
       if name != "frames"},
    "sections": [], "seed": "", "begin": TEXT, "size": OWN, "width": 64, "height": 64}
NAMES = tuple(DEFAULTS)
NOT_OF_THE_FORM = {"made_by", "notes", "scale", "source"}  # what a file's settings have besides; known


def to_params(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params that the form asks for, as `validate` takes them: without the fields that are empty."""
    raw = {name: value for name, value in values.items() if name not in ("begin", "size", "width", "height")}
    raw = {name: value for name, value in raw.items() if not (isinstance(value, str) and not value.strip())}
    raw["sections"] = raw.get("sections") or []
    begin = values["begin"]
    for name, of in ("upload", FILE), ("job", HISTORY):
        if begin != of:
            raw.pop(name, None)
    if begin == FILE and not raw.get("upload"):
        raise UserError("Start from an image or video: upload a file, or choose text only.")
    if begin == HISTORY and not raw.get("job"):
        raise UserError("Start from a video of the history: choose one, or choose text only.")
    chosen = str(values["size"] or OWN)
    if chosen == CUSTOM:
        raw |= {"width": values["width"], "height": values["height"]}
    elif chosen != OWN:
        width, _, height = chosen.partition("x")
        raw |= {"width": width, "height": height}
    return raw


def to_form(params: Mapping[str, Any], card: PipelineSpec, max_side: int, seed: bool = True) -> dict[str, Any]:
    """Return a job's params, or the settings stored in a file, as values of the form; what is missing has its default.

    Args:
        seed: keep it; otherwise a new one is drawn.
    """
    values = {**DEFAULTS, **{name: params[name] for name in NAMES if params.get(name) is not None}}
    values["sections"] = [[float(second), str(text)] for second, text in params.get("sections") or ()]
    values["seed"] = str(params["seed"]) if seed and params.get("seed") is not None else ""
    for name in "frame_rate", "shift":
        values[name] = f"{params[name]:g}" if params.get(name) else ""
    if params.get("frames"):
        values["seconds"] = round(params["frames"] / (params.get("frame_rate") or card.frame_rate), 3)
    values["begin"] = FILE if params.get("upload") else HISTORY if params.get("job") else TEXT
    height, width = params.get("height"), params.get("width")
    if height and width:
        named = f"{width}x{height}"
        own = (height, width) == (card.height, card.width)
        values["size"] = OWN if own else named if named in {size for _, size in sizes(card, max_side)} else CUSTOM
    else:
        values["size"] = OWN
    return values


def from_draft(draft: Any, first: Mapping[str, Any]) -> dict[str, Any]:
    """Return the draft that the browser has kept as values of the form; what is invalid is as in `first`."""
    kept = draft if isinstance(draft, dict) else {}
    values = {name: kept[name] if _alike(kept.get(name), old) else old for name, old in first.items()}
    if values["begin"] not in (TEXT, FILE, HISTORY):
        values["begin"] = TEXT
    if not all(isinstance(one, list) and len(one) == 2 for one in values["sections"]):
        values["sections"] = []
    return values


def _alike(new: Any, old: Any) -> bool:
    if isinstance(old, int | float):
        return isinstance(new, int | float) and math.isfinite(new)
    return isinstance(new, type(old))


def sizes(card: PipelineSpec, max_side: int) -> list[tuple[str, str]]:
    """Return sizes that the model can generate as (label, value): its own, larger ones, other shapes."""
    found = {OWN: f"{card.width}x{card.height}, the model's"}
    wide = math.sqrt(16 / 9)
    for label, across, down in (("1.5 times", 1.5, 1.5), ("twice", 2, 2), ("wide", wide, 1 / wide),
                                ("tall", 1 / wide, wide), ("wide, large", 1.5 * wide, 1.5 / wide)):  # fmt: skip
        width, height = card.nearest(round(card.width * across)), card.nearest(round(card.height * down))
        if max(width, height) <= max_side and (width, height) != (card.width, card.height):
            found.setdefault(f"{width}x{height}", f"{width}x{height}, {label}")
    return [(label, value) for value, label in found.items()] + [("custom ...", CUSTOM)]


@dataclass(frozen=True)
class Checked:
    """The params that a form comes to, and what they cost."""

    params: GenerateParams
    card: PipelineSpec
    estimate: Estimate


def settled(values: Mapping[str, Any], services: Services, owner: str) -> Checked:
    """Check the form without queueing a job. Raises UserError."""
    params = GenerateParams.model_validate(validate(to_params(values), services, owner)[0])
    folder = pipeline_folder(params.pipeline, services)
    card = load_pipeline_spec(folder)
    given = _given(params, card, services, owner)
    return Checked(params, card, estimate(params, card, folder, services.store.get_value, given))


def _given(params: GenerateParams, card: PipelineSpec, services: Services, owner: str) -> int:
    """Count the frames that are there already."""
    if params.job:
        return int(source_job(params, services, owner).result["frames"])
    if params.upload:
        upload = services.uploads.find(params.upload, owner)
        if upload.kind == "video" and upload.seconds:
            steps = int((upload.seconds * (params.frame_rate or card.frame_rate) - 1) // card.temporal_compression)
            return 1 + card.temporal_compression * max(0, steps)
        return 1
    return 0


def hint(values: Mapping[str, Any], services: Services, owner: str) -> str:
    """Return what the form comes to, or what is wrong with it, as HTML."""
    try:
        # An empty prompt is no mistake yet.
        now = settled({**values, "prompt": str(values["prompt"] or "").strip() or "a"}, services, owner)
    except UserError as error:
        return render("form.html", "invalid", error)
    p, made = now.params, now.estimate
    assert p.frames is not None and p.frame_rate is not None
    cost = ["no measurements from this machine yet" if made.seconds is None else
            f"about {format_duration(max(1, made.seconds))}"]  # fmt: skip
    cost += [f"{format_bytes(made.bytes)} of memory"] if made.bytes is not None else []
    video = (f"{count(p.frames, 'frame')} on the model's grid (1+{now.card.temporal_compression}k), plays "
             f"{p.frames / p.frame_rate:.1f} s at {p.frame_rate:g} fps, {p.width}x{p.height}")  # fmt: skip
    return render("form.html", "hint", video, cost)


def from_metadata(
    settings: Mapping[str, Any], card: PipelineSpec, max_side: int, seed: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a file as values of the form, and notes on what could not be used."""
    known = {name: value for name, value in settings.items() if name in GenerateParams.model_fields}
    for name in "upload", "job", "pipeline":  # ids of another app's
        known.pop(name, None)
    try:
        params = GenerateParams.model_validate({name: value for name, value in known.items() if value is not None})
    except ValueError:
        known, broken = _readable(known)
        params = GenerateParams.model_validate(known)
    else:
        broken = []
    strange = sorted(str(name)[:40] for name in set(settings) - set(GenerateParams.model_fields) - NOT_OF_THE_FORM)
    notes = [f"Ignored, as they are unknown here: {', '.join(strange[:8])}."] if strange else []
    notes += [f"Ignored, as they are invalid here: {', '.join(broken)}."] if broken else []
    if settings.get("source"):
        notes.append(f"It started from {str(settings['source'])[:120]}: upload that file again.")
    given = {name: getattr(params, name) for name in known}
    return to_form(given, card, max_side, seed), notes


def _readable(known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
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


def own_videos(jobs: list[Job]) -> list[tuple[str, str]]:
    """Return the videos of the history that can be extended as (label, id)."""
    return [
        (f"{job.title[:60]} ({job.result.get('seconds', 0):.1f} s)", job.id)
        for job in jobs
        if job.kind is JobKind.GENERATE and job.state in (JobState.DONE, JobState.STOPPED) and job.result.get("final")
    ]
