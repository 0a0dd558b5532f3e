"""What the buttons of the page do, without Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.api.service import JobAction, JobService
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import pipeline_folder
from app.tasks.pipeline_spec import PipelineSpec, load_pipeline_spec
from app.ui.form_values import DEFAULTS, HISTORY, from_metadata, to_form, to_params
from app.ui.html.job import used_settings
from app.ui.html.labels import VIDEO_KINDS, count
from odvae.utils.errors import UserError

LONGER = 4.0  # seconds by which a video is extended by default


@dataclass(frozen=True)
class PageUpdate:
    """What changes on the page; None: it stays as it is."""

    followed: str | None = None  # the job that is shown
    notice: str = ""
    values: dict[str, Any] | None = None  # of the form
    editing: str | None = None  # the job that the form changes; "": none
    show: bool = False  # bring the form and the player to the front


class GenerateActions:
    """The actions of the Generate tab. Every method checks who owns the job, and raises UserError."""

    def __init__(self, service: JobService) -> None:
        self.service = service

    def current_job(self, followed: str | None, owner: str) -> Job | None:
        """Return the job to show: the chosen one, else what runs or comes next, else the newest."""
        if followed:
            job = self.service.store.get(followed)
            if job is not None and job.kind in VIDEO_KINDS and not (self.service.private and job.owner != owner):
                return job
        running = self.service.history(owner, kinds=VIDEO_KINDS, states=[JobState.RUNNING], limit=1)
        waiting = [job for _, job in self.service.queue(owner) if job.kind in VIDEO_KINDS] if not running else []
        newest = running or waiting or self.service.history(owner, kinds=VIDEO_KINDS, limit=1)
        return newest[0] if newest else None

    def generate(self, values: Mapping[str, Any], followed: str | None, editing: str, owner: str) -> PageUpdate:
        """Queue the video that the form asks for, or save the job that is being edited."""
        if editing:
            job = self.service.edit(editing, to_params(values), owner)
            return PageUpdate(notice="The changes are saved.", editing="", followed=job.id)
        raw = to_params(values)
        return self._queued(self.service.submit(JobKind.GENERATE, raw, owner, raw.get("job", "")), followed, owner)

    def act(self, action: str, job_id: str, value: str, followed: str | None, owner: str) -> PageUpdate:
        """Do what a button of a job asks for. `value`: of the field beside the button."""
        job = self.service.find(job_id, owner)
        match action:
            case "open" if job.kind in VIDEO_KINDS:
                return PageUpdate(followed=job.id, show=True)
            case "decode":
                tile = int(value) if value.isdecimal() and len(value) < 6 else None
                raw = {"job": job.id, "tile": tile}
                return self._queued(self.service.submit(JobKind.DECODE, raw, owner, job.id), followed, owner)
            case "edit" | "reuse" | "reseed" | "longer" if job.kind is JobKind.GENERATE:
                return self._into_form(action, job)
        now = self.service.act(job.id, action, owner)
        match action:
            case JobAction.DUPLICATE:
                return self._queued(now, followed, owner)
            case JobAction.RESUME if job.kind in VIDEO_KINDS:
                return PageUpdate(followed=job.id)
            case JobAction.DELETE if followed == job.id:
                return PageUpdate(followed="")
        return PageUpdate()

    def _queued(self, job: Job, followed: str | None, owner: str) -> PageUpdate:
        """Show the new job, unless the page shows one that is still active."""
        shown = self.current_job(followed, owner)
        if shown is None or shown.id == job.id or not shown.state.active:
            return PageUpdate(followed=job.id)
        before = next((before for before, one in self.service.queue(owner) if one.id == job.id), 0)
        return PageUpdate(followed=shown.id, notice=f"Queued, with {count(before, 'job')} before it.")

    def _into_form(self, action: str, job: Job) -> PageUpdate:
        values = to_form(job.params, self.card(job.params), self.service.config.max_side, seed=action != "reseed")
        values["seconds"] = min(values["seconds"], self.service.config.max_seconds)  # the grid may have gone beyond
        match action:
            case "edit":
                if job.state not in (JobState.QUEUED, JobState.PAUSED) or job.revision:
                    raise UserError("Only a queued job that has not started can be changed. Duplicate it instead.")
                return PageUpdate(values=values, editing=job.id, show=True,
                                  notice="The form shows the queued job. Change it, then save.")
            case "longer":
                settings = used_settings(job)
                most = self.service.config.max_seconds
                seconds = float(job.result.get("seconds") or values["seconds"])
                longer = min(max(most, seconds), seconds + LONGER)
                sections = [[float(second), str(text)] for second, text in settings.get("sections") or ()]
                values |= {"begin": HISTORY, "job": job.id, "upload": "", "seconds": round(longer, 3),
                           "prompt": settings.get("prompt", values["prompt"]), "sections": sections}
                return PageUpdate(values=values, editing="", show=True,
                                  notice="The video is extended from its end. Seconds are those of the whole; a "
                                         "changed prompt applies from the join on.")
        seed = "with its seed" if action == "reuse" else "without the seed"
        return PageUpdate(
            values=values, editing="", show=True, notice=f"The form has the settings of the video, {seed}."
        )

    def restore(self, settings: Mapping[str, Any], seed: bool) -> PageUpdate:
        """Load the settings stored in a file into the form."""
        values, notes = from_metadata(settings, self.card({}), self.service.config.max_side, seed)
        said = "The form has the settings of the file" + (", with its seed." if seed else ", without the seed.")
        most = self.service.config.max_seconds
        if values["seconds"] > most + 1:
            notes.append(f"It is longer than the {most:g} s that are allowed here.")
        values["seconds"] = min(values["seconds"], most)
        return PageUpdate(values=values, editing="", show=True, notice=" ".join([said, *notes]))

    def last_seed(self, owner: str) -> str:
        """Return the seed of the newest video; "": there is none."""
        newest = self.service.history(owner, kinds=[JobKind.GENERATE], limit=1)
        return str(newest[0].params["seed"]) if newest else ""

    def card(self, params: Mapping[str, Any]) -> PipelineSpec:
        """Return the spec of the pipeline that params name; of the app's own where it is gone."""
        services = self.service.services
        try:
            return load_pipeline_spec(pipeline_folder(params.get("pipeline") or "", services))
        except UserError:
            return load_pipeline_spec(services.config.pipeline)


def first_values(service: JobService, card: PipelineSpec) -> dict[str, Any]:
    """Return the initial values of the form."""
    return {**DEFAULTS, "seconds": min(DEFAULTS["seconds"], service.config.max_seconds), "width": card.width,
            "height": card.height}

