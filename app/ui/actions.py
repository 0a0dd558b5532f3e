"""The actions of the page's buttons, without Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.api.service import JobAction, JobService
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import pipeline_folder
from app.tasks.pipeline_spec import PipelineSpec, load_pipeline_spec
from app.ui.form_values import DEFAULTS, HISTORY, from_metadata, schedulers, sizes, to_form, to_params
from app.ui.html.job import used_settings
from app.ui.html.labels import VIDEO_KINDS, count
from odvae.utils.errors import UserError

EXTENSION_SECONDS = 4.0  # by which a video is extended by default


@dataclass(frozen=True)
class PageUpdate:
    """Changes of the page; None: no change."""

    followed: str | None = None  # the id of the shown job
    notice: str = ""
    values: dict[str, Any] | None = None  # of the form
    editing: str | None = None  # the id of the job that the form edits; "": none
    show: bool = False  # switch to the Generate tab


class GenerateActions:
    """The actions of the Generate tab. Every method checks the owner of the job, and raises UserError."""

    def __init__(self, service: JobService) -> None:
        self.service = service

    def current_job(self, followed: str | None, owner: str) -> Job | None:
        """Return the job to show: the followed one, else the running or the next one, else the newest."""
        if followed:
            job = self.service.store.get(followed)
            if job is not None and job.kind in VIDEO_KINDS and not (self.service.private and job.owner != owner):
                return job
        running = self.service.history(owner, kinds=VIDEO_KINDS, states=[JobState.RUNNING], limit=1)
        queued = [job for _, job in self.service.queue(owner) if job.kind in VIDEO_KINDS] if not running else []
        candidates = running or queued or self.service.history(owner, kinds=VIDEO_KINDS, limit=1)
        return candidates[0] if candidates else None

    def generate(self, values: Mapping[str, Any], followed: str | None, editing: str, owner: str) -> PageUpdate:
        """Queue the video of the form, or save the job that is being edited."""
        if editing:
            job = self.service.edit(editing, self._params(values), owner)
            return PageUpdate(notice="The changes are saved.", editing="", followed=job.id)
        raw = self._params(values)
        return self._show_queued(self.service.submit(JobKind.GENERATE, raw, owner, raw.get("job", "")), followed, owner)

    def act(self, action: str, job_id: str, value: str, followed: str | None, owner: str) -> PageUpdate:
        """Do the action of a job's button. `value`: of the field beside the button."""
        job = self.service.find(job_id, owner)
        match action:
            case "open" if job.kind in VIDEO_KINDS:
                return PageUpdate(followed=job.id, show=True)
            case "decode":
                tile = int(value) if value.isdecimal() and len(value) < 6 else None
                raw = {"job": job.id, "tile": tile}
                return self._show_queued(self.service.submit(JobKind.DECODE, raw, owner, job.id), followed, owner)
            case "edit" | "reuse" | "reseed" | "extend" if job.kind is JobKind.GENERATE:
                return self._load_into_form(action, job)
        job = self.service.act(job.id, action, owner)
        match action:
            case JobAction.DUPLICATE:
                return self._show_queued(job, followed, owner)
            case JobAction.RESUME if job.kind in VIDEO_KINDS:
                return PageUpdate(followed=job.id)
            case JobAction.DELETE if followed == job.id:
                return PageUpdate(followed="")
        return PageUpdate()

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return to_params(values, self.pipeline_spec(values).unsupported)

    def _show_queued(self, job: Job, followed: str | None, owner: str) -> PageUpdate:
        """Show the new job, unless the page shows an active one."""
        shown = self.current_job(followed, owner)
        if shown is None or shown.id == job.id or not shown.state.active:
            return PageUpdate(followed=job.id)
        before = next((before for before, queued in self.service.queue(owner) if queued.id == job.id), 0)
        place = f"with {count(before, 'job')} before it" if before else "next to start"
        return PageUpdate(followed=shown.id, notice=f"Queued, {place}.")

    def _load_into_form(self, action: str, job: Job) -> PageUpdate:
        config = self.service.config
        values = to_form(job.params, self.pipeline_spec(job.params), config.max_side, seed=action != "reseed")
        values["seconds"] = min(values["seconds"], config.max_seconds)  # the nearest valid length may be longer
        match action:
            case "edit":
                if job.state not in (JobState.QUEUED, JobState.PAUSED) or job.revision:
                    raise UserError("Only a queued job that has not started can be changed. Duplicate it instead.")
                return PageUpdate(values=values, editing=job.id, show=True,
                                  notice="The form shows the queued job. Change it, then save.")
            case "extend":
                settings = used_settings(job)
                limit = config.max_seconds
                seconds = float(job.result.get("seconds") or values["seconds"])
                extended = min(max(limit, seconds), seconds + EXTENSION_SECONDS)
                sections = [[float(second), str(text)] for second, text in settings.get("sections") or ()]
                values |= {"start_from": HISTORY, "job": job.id, "upload": "", "seconds": round(extended, 3),
                           "prompt": settings.get("prompt", values["prompt"]), "sections": sections}
                return PageUpdate(values=values, editing="", show=True,
                                  notice="The video is extended from its end. Seconds is the length of the whole "
                                         "video; a changed prompt applies from the join on.")
        seed = "with its seed" if action == "reuse" else "without the seed"
        return PageUpdate(
            values=values, editing="", show=True, notice=f"The form has the settings of the video, {seed}."
        )

    def restore(self, settings: Mapping[str, Any], seed: bool) -> PageUpdate:
        """Load the settings stored in a file into the form."""
        loras = self.service.services.assets.list("lora")
        values, notes = from_metadata(settings, self.pipeline_spec({}), self.service.config.max_side, seed, loras)
        message = "The form has the settings of the file" + (", with its seed." if seed else ", without the seed.")
        limit = self.service.config.max_seconds
        if values["seconds"] > limit + 1:
            notes.append(f"It is longer than the limit of {limit:g} s.")
        values["seconds"] = min(values["seconds"], limit)
        return PageUpdate(values=values, editing="", show=True, notice=" ".join([message, *notes]))

    def last_seed(self, owner: str) -> str:
        """Return the seed of the newest video, "" if there is none."""
        newest = self.service.history(owner, kinds=[JobKind.GENERATE], limit=1)
        return str(newest[0].params["seed"]) if newest else ""

    def pipeline_spec(self, params: Mapping[str, Any]) -> PipelineSpec:
        """Return the spec of the params' pipeline, or of the app's default pipeline if it is gone."""
        return load_pipeline_spec(self.pipeline_folder(params.get("pipeline") or ""))

    def pipeline_folder(self, pipeline: str) -> Path | None:
        """Return the folder of a pipeline, or of the app's default pipeline if it is gone."""
        services = self.service.services
        try:
            folder = pipeline_folder(pipeline, services)
            load_pipeline_spec(folder)
        except UserError:
            return services.config.pipeline
        return folder

    def choices(self, pipeline: str) -> dict[str, list[tuple[str, str]]]:
        """Return the choices of the fields that depend on the pipeline."""
        spec = self.pipeline_spec({"pipeline": pipeline})
        return {"scheduler": schedulers(spec), "size": sizes(spec, self.service.config.max_side)}


def initial_values(service: JobService, spec: PipelineSpec) -> dict[str, Any]:
    """Return the initial values of the form."""
    return {**DEFAULTS, "num_inference_steps": spec.num_inference_steps, "guidance_scale": spec.guidance_scale,
            "seconds": min(spec.own_seconds(), service.config.max_seconds),
            "width": spec.width, "height": spec.height}
