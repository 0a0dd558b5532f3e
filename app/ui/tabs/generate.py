"""The Generate tab: the form on the left; the player, the progress and the queue on the right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import DEFAULT_PIPELINE
from app.tasks.pipeline_spec import PipelineSpec, describe_limits
from app.ui.actions import GenerateActions, PageUpdate, initial_values
from app.ui.form_fields import EXAMPLES, make_fields
from app.ui.form_values import CUSTOM, FILE, HISTORY, NAMES, from_draft, hint, starts_from_text, video_choices
from app.ui.html import job as job_html
from app.ui.html.queue import queue, queue_entries
from app.ui.html.templates import render
from app.ui.html.thumbnail import thumbnail
from app.ui.loras import lora_choices
from app.ui.page import FILES, SILENT_EVENT, Page, error_html, owner_of, read_static, uploaded
from odvae.utils.errors import UserError

TAB = "generate"  # the id of the tab
PANELS = ("examples", "source", "upload_panel", "extend_panel")  # controls that some pipelines have no use for
# The fields that some pipelines do not take.
HIDEABLE = ("start_from", "sections", "negative_prompt", "loras", "scheduler", "guidance_rescale", "shift",
            "history_groups", "history_noise", "history_follow", "sink_period")
CHOICES = ("scheduler", "size")  # fields whose choices are the pipeline's
OWN = ("num_inference_steps", "guidance_scale", "seconds", "frame_rate", "size")  # fields with values of its own
GENERATE, SAVE = "Generate", "Save changes"

# Raw values: Gradio would answer a value out of a slider's range with its own error, before `validate` can.
RAW_VALUES: dict[str, Any] = SILENT_EVENT | {"preprocess": False}


@dataclass
class Form:
    """The form, which other tabs fill and switch to. Events return their changes by component."""

    actions: GenerateActions
    fields: dict[str, Any]  # by the names in `form_values.NAMES`
    followed: gr.BrowserState
    editing: gr.State
    notice: gr.HTML
    submit: gr.Button
    discard: gr.Button
    tabs: gr.Tabs
    refresh: dict[str, Any]  # the event that updates the page

    @property
    def inputs(self) -> list[Any]:
        return [self.fields[name] for name in NAMES]

    @property
    def outputs(self) -> list[Any]:
        """The components that `update` may change."""
        return [self.followed, self.editing, self.notice, self.submit, self.discard, self.tabs, *self.inputs]

    def update(self, page_update: PageUpdate) -> dict[Any, Any]:
        """Return the changes of an action."""
        changes: dict[Any, Any] = {}
        if page_update.followed is not None:
            changes[self.followed] = page_update.followed or None
        if page_update.editing is not None:
            changes |= {self.editing: page_update.editing,
                        self.submit: gr.update(value=SAVE if page_update.editing else GENERATE),
                        self.discard: gr.update(visible=bool(page_update.editing))}  # fmt: skip
        if page_update.values is not None:
            changes |= {self.fields[name]: page_update.values[name] for name in NAMES}
            choices = self.actions.choices(page_update.values["pipeline"])
            changes |= {self.fields[name]: gr.update(value=page_update.values[name], choices=choices[name])
                        for name in CHOICES}
        if page_update.show:
            changes |= {self.tabs: gr.update(selected=TAB), self.notice: job_html.notice(page_update.notice)}
        return changes

    def run(self, action: Callable[[], PageUpdate], notice: gr.HTML) -> dict[Any, Any]:
        """Do an action. Return its changes, or an error in `notice`."""
        try:
            page_update = action()
        except UserError as error:
            return {notice: error_html(error)}
        return {notice: "" if page_update.show else job_html.notice(page_update.notice)} | self.update(page_update)

    def listen(self, panel: gr.HTML, notice: gr.HTML, refresh: dict[str, Any]) -> None:
        """Do the actions of an HTML panel's buttons (actions.js). `notice`: for errors."""

        def on_click(followed: str | None, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
            data = event._data if isinstance(event._data, dict) else {}
            action, job, value = (str(data.get(name) or "") for name in ("action", "job", "value"))
            return self.run(lambda: self.actions.act(action, job, value, followed, owner_of(request)), notice)

        panel.click(on_click, [self.followed], [notice, *self.outputs], **SILENT_EVENT).then(**refresh)


def build(page: Page) -> None:
    """Add the tab's components and events. Other tabs find its form at `page.form`."""
    handlers = Handlers(page)
    # Key and secret are fixed, so that a page finds its values after a restart; the values are no secret.
    followed = gr.BrowserState(None, storage_key="lvdm-followed", secret="lvdm-app")
    draft = gr.BrowserState(None, storage_key="lvdm-draft", secret="lvdm-app")  # survives a reload
    editing = gr.State("")
    with gr.Row(elem_classes="lv-main", equal_height=False):
        with gr.Column(scale=4, min_width=320, elem_id="form"):
            fields, controls = make_fields(handlers.initial, handlers.spec, page.service.config)
            with gr.Column(elem_id="submit-bar"):
                notice = gr.HTML("", elem_id="notice")
                check = gr.HTML("", elem_id="check", js_on_load=read_static("generate.js"))
                with gr.Row(elem_id="submit-row"):
                    submit = gr.Button(GENERATE, variant="primary", size="lg", elem_id="generate", scale=3)
                    discard = gr.Button("Discard", size="lg", elem_id="discard-edit", visible=False, scale=1)
        with gr.Column(scale=5, min_width=320, elem_id="player-column"):
            player = gr.HTML(
                job_html.player(None),
                html_template=read_static("player.html"),
                js_on_load=read_static("player.js"),
                elem_id="player",
            )
            status = gr.HTML(job_html.status(None), elem_id="status")
            player_notice = gr.HTML("", elem_id="player-notice")
            about = gr.HTML("", js_on_load=read_static("actions.js"), elem_id="about")
            queue_panel = gr.HTML("", js_on_load=read_static("actions.js"), elem_id="queue")

    refresh = page.poll(handlers.update, [followed], [player, status, about, queue_panel])
    assert page.tabs is not None
    form = Form(handlers.actions, fields, followed, editing, notice, submit, discard, page.tabs, refresh)
    page.form = form
    gr.on([fields[name].change for name in NAMES], handlers.on_change, form.inputs, [check, draft],
          trigger_mode="always_last", **RAW_VALUES)
    restored = page.blocks.load(handlers.restore_draft, [draft], form.inputs, **SILENT_EVENT)
    restored.then(handlers.check, form.inputs, [check], **RAW_VALUES)
    about.change(handlers.check, form.inputs, [check], **RAW_VALUES)  # a finished video updates the estimate

    def on_submit(request: gr.Request, followed: str | None, editing: str, *values: Any) -> dict[Any, Any]:
        form_values = dict(zip(NAMES, values, strict=True))
        return form.run(lambda: handlers.actions.generate(form_values, followed, editing, owner_of(request)), notice)

    def on_discard() -> dict[Any, Any]:
        return form.update(PageUpdate(editing="", values=handlers.initial, show=True))

    submit.click(on_submit, [followed, editing, *form.inputs], form.outputs, **RAW_VALUES).then(**refresh)
    discard.click(on_discard, None, form.outputs, **SILENT_EVENT)
    for panel in about, queue_panel:
        form.listen(panel, player_notice, refresh)
    _connect(page, handlers, fields, controls, notice)


def _connect(page: Page, handlers: Handlers, f: dict[str, Any], controls: dict[str, Any], notice: gr.HTML) -> None:
    """Connect the events that fill and show fields."""
    panels = [controls["upload_panel"], controls["extend_panel"], f["job"]]
    f["start_from"].change(handlers.show_source, [f["start_from"]], panels, **SILENT_EVENT)
    f["size"].change(lambda size: gr.update(visible=size == CUSTOM), [f["size"]], [controls["sides"]], **SILENT_EVENT)
    hideable = [*(controls[name] for name in ("limits", *PANELS)), *(f[name] for name in HIDEABLE)]
    changed = [f["pipeline"].change, page.blocks.load]
    gr.on(changed, handlers.hide_unsupported, [f["pipeline"], f["start_from"]], hideable, **SILENT_EVENT)
    gr.on(changed, handlers.fit_choices, [f["pipeline"], *(f[name] for name in CHOICES)],
          [*(f[name] for name in CHOICES), f["loras"], f["frame_rate"], f["width"], f["height"]], **RAW_VALUES)
    f["pipeline"].input(handlers.own_values, [f["pipeline"]], [f[name] for name in OWN], **SILENT_EVENT)
    file = controls["file"]
    file.upload(handlers.accept_upload, [file], [f["upload"], file, notice], **FILES)
    f["upload"].change(handlers.describe_upload, [f["upload"]], [controls["upload_info"]], **SILENT_EVENT)
    controls["latest"].click(handlers.latest, None, [f["job"]], **SILENT_EVENT)
    controls["random"].click(lambda: "", None, [f["seed"]], **SILENT_EVENT)
    controls["reuse"].click(handlers.last_seed, None, [f["seed"]], **SILENT_EVENT)
    controls["examples"].click(handlers.example, None, [f["prompt"]], **SILENT_EVENT)
    page.blocks.load(handlers.choices, None, [f["pipeline"], f["job"]], **SILENT_EVENT)


class Handlers:
    """The form's events that need the server."""

    def __init__(self, page: Page) -> None:
        self.service, self.actions = page.service, GenerateActions(page.service)
        try:
            self.spec = self.actions.pipeline_spec({})
        except UserError:  # the pipeline is gone: the form is shown, and reports it when it is used
            self.spec = PipelineSpec()
        self.initial = initial_values(page.service, self.spec)

    def update(self, followed: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Return the player's value, the status, the details and the queue."""
        owner, service = owner_of(request), self.service
        job = self.actions.current_job(followed, owner)
        entries = queue_entries(service, owner)
        entry = next((entry for entry in entries if job is not None and entry.job.id == job.id), None)
        preview = job is not None and self._has_preview(job)
        panel = queue(entries, service.store.workers(), job.id if job else "")
        before, starts = (entry.before, entry.starts) if entry else (0, None)
        return job_html.player(job, preview), job_html.status(job, before, starts, preview), job_html.about(job), panel

    def _has_preview(self, job: Job) -> bool:
        if job.state is not JobState.RUNNING or job.progress.phase == "writing":  # it is removed in this phase
            return False
        return self.service.job_files.public_file(job, "preview.webp") is not None

    def check(self, request: gr.Request, *values: Any) -> str:
        return hint(dict(zip(NAMES, values, strict=True)), self.service.services, owner_of(request))

    def on_change(self, request: gr.Request, *values: Any) -> tuple[str, Any]:
        """Return the check, and the draft for the browser."""
        return self.check(request, *values), list(values)

    def restore_draft(self, draft: Any) -> list[Any]:
        """Restore the draft. Defaults are not sent: the user may be typing already."""
        now = self.initial | initial_values(self.service, self._spec(""))  # the settings may have changed
        stored = draft if isinstance(draft, list) and len(draft) == len(NAMES) else [now[name] for name in NAMES]
        values = from_draft(dict(zip(NAMES, stored, strict=True)), self.initial)
        choices = self.actions.choices(values["pipeline"])
        return [gr.skip() if value == self.initial[name] else gr.update(value=value, choices=choices[name])
                if name in CHOICES else value for name, value in values.items()]

    def show_source(self, start_from: str, request: gr.Request) -> tuple[Any, ...]:
        videos = gr.update(choices=self._videos(request)) if start_from == HISTORY else gr.skip()
        return gr.update(visible=start_from == FILE), gr.update(visible=start_from == HISTORY), videos

    def choices(self, request: gr.Request) -> tuple[Any, Any]:
        """Return the pipelines and videos that can be chosen."""
        assets = self.service.services.assets.list("pipeline")
        pipelines = [(f"{asset.name} ({asset.detail})" if asset.detail else asset.name, asset.id) for asset in assets]
        settings = (f"from Settings: {self._spec('').name}", "")
        default = (f"the app's default: {self._spec(DEFAULT_PIPELINE).name}", DEFAULT_PIPELINE)
        return gr.update(choices=[settings, default, *pipelines]), gr.update(choices=self._videos(request))

    def _videos(self, request: gr.Request) -> list[tuple[str, str]]:
        return video_choices(self.service.history(owner_of(request), kinds=[JobKind.GENERATE], limit=60))

    def _spec(self, pipeline: str | None) -> PipelineSpec:
        """The spec of the form's pipeline."""
        try:
            return self.actions.pipeline_spec({"pipeline": pipeline or ""})
        except UserError:
            return self.spec

    def hide_unsupported(self, pipeline: str | None, start_from: str) -> list[Any]:
        """Hide the fields that the pipeline does not take, and say why."""
        spec = self._spec(pipeline)
        unsupported, text_only = spec.unsupported, starts_from_text(spec.unsupported)
        shown = [spec.kind == "LVDMPipeline", not text_only]
        shown += [start_from == source and not text_only for source in (FILE, HISTORY)]
        shown += [not text_only if name == "start_from" else name not in unsupported for name in HIDEABLE]
        return [render("form.html", "limits", describe_limits(spec)), *(gr.update(visible=value) for value in shown)]

    def own_values(self, pipeline: str | None) -> tuple[Any, ...]:
        """Return the pipeline's own steps, guidance and length, and leave frame rate and size to it."""
        spec = self._spec(pipeline)
        return (spec.num_inference_steps, spec.guidance_scale,
                round(min(spec.own_seconds(), self.service.config.max_seconds), 3), "", "")

    def fit_choices(self, pipeline: str | None, *chosen: Any) -> list[Any]:
        """Return the schedulers, sizes and LoRAs of the pipeline, and its own frame rate. A scheduler or size that it
        has not is replaced by its own; LoRAs stay, as the check below the form names those that do not fit."""
        spec, choices = self._spec(pipeline), self.actions.choices(pipeline or "")
        fields: list[Any] = []
        for name, value in zip(CHOICES, chosen, strict=True):
            known = value in [known for _, known in choices[name]]
            fields.append(gr.update(choices=choices[name]) if known else gr.update(choices=choices[name], value=""))
        loras, hint = lora_choices(self.service.services.assets, self.actions.pipeline_folder(pipeline or ""))
        side = gr.update(step=spec.size_multiple, minimum=spec.size_multiple)
        return [*fields, gr.update(choices=loras, hint=hint),
                gr.update(placeholder=f"{spec.frame_rate:g}, the pipeline's"), side, side]

    def accept_upload(self, file: Any, request: gr.Request) -> tuple[Any, ...]:
        """Accept an uploaded file."""
        if not file:
            return gr.skip(), gr.skip(), ""
        try:
            upload = self.service.services.uploads.add(*uploaded(file), owner_of(request))
        except UserError as error:
            return "", None, error_html(error)
        return upload.id, None, ""

    def describe_upload(self, upload_id: str, request: gr.Request) -> str:
        """Describe the file that the video starts from."""
        if not upload_id:
            return ""
        try:
            upload = self.service.services.uploads.find(upload_id, owner_of(request))
        except UserError as error:
            return error_html(error)
        details = f"{'image' if upload.kind == 'image' else upload.kind}, {upload.width}x{upload.height}"
        details += f", {upload.seconds:.1f} s" if upload.kind == "video" and upload.seconds else ""
        return render("form.html", "upload", upload.name, details, thumbnail(upload.path, upload.kind))

    def latest(self, request: gr.Request) -> Any:
        videos = self._videos(request)
        return gr.update(choices=videos, value=videos[0][1]) if videos else gr.skip()

    def last_seed(self, request: gr.Request) -> str:
        return self.actions.last_seed(owner_of(request))

    def example(self, event: gr.EventData) -> Any:
        number = str(event._data.get("job")) if isinstance(event._data, dict) else ""
        prompts = {str(i): prompt for i, prompt in enumerate(EXAMPLES.values())}
        return prompts.get(number, gr.skip())
