"""The Generate tab: the form on the left; player, progress and queue on the right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import DEFAULT_PIPELINE
from app.tasks.pipeline_spec import PipelineSpec
from app.ui.actions import GenerateActions, PageUpdate, first_values
from app.ui.form_fields import AS_SET, EXAMPLES, make_fields
from app.ui.form_values import CUSTOM, FILE, HISTORY, NAMES, from_draft, hint, own_videos, sizes
from app.ui.html import job as views
from app.ui.html.queue import queue, turns_of
from app.ui.html.templates import render
from app.ui.html.thumbnail import thumbnail
from app.ui.page import FILES, SILENT_EVENT, Page, error_html, owner_of, read_static, uploaded
from odvae.utils.errors import UserError

TAB = "generate"  # the id of the tab
GENERATE, SAVE = "Generate", "Save changes"

# Gradio would answer a value beyond a slider's ends with an error of its own, and checks nothing that `validate`
# does not check: unprocessed, our own messages say what is wrong.
AS_GIVEN: dict[str, Any] = SILENT_EVENT | {"preprocess": False}


@dataclass
class Form:
    """The components that other tabs fill and lead to. Events return what they change, by component."""

    actions: GenerateActions
    fields: dict[str, Any]  # by the names in `form_values.NAMES`
    followed: gr.BrowserState
    editing: gr.State
    notice: gr.HTML
    submit: gr.Button
    leave: gr.Button
    tabs: gr.Tabs
    refresh: dict[str, Any]  # the event that shows the page as it is now

    @property
    def inputs(self) -> list[Any]:
        return [self.fields[name] for name in NAMES]

    @property
    def outputs(self) -> list[Any]:
        """The components that `update` may change."""
        return [self.followed, self.editing, self.notice, self.submit, self.leave, self.tabs, *self.inputs]

    def update(self, done: PageUpdate) -> dict[Any, Any]:
        """Return what an action changes."""
        changes: dict[Any, Any] = {}
        if done.followed is not None:
            changes[self.followed] = done.followed or None
        if done.editing is not None:
            changes |= {self.editing: done.editing, self.submit: gr.update(value=SAVE if done.editing else GENERATE),
                        self.leave: gr.update(visible=bool(done.editing))}  # fmt: skip
        if done.values is not None:
            changes |= {self.fields[name]: done.values[name] for name in NAMES}
        if done.show:
            changes |= {self.tabs: gr.update(selected=TAB), self.notice: views.notice(done.notice)}
        return changes

    def run(self, action: Callable[[], PageUpdate], notice: gr.HTML) -> dict[Any, Any]:
        """Do an action. Return what it changes; only `notice` where the user made a mistake."""
        try:
            done = action()
        except UserError as error:
            return {notice: error_html(error)}
        return {notice: "" if done.show else views.notice(done.notice)} | self.update(done)

    def listen(self, panel: gr.HTML, notice: gr.HTML, refresh: dict[str, Any]) -> None:
        """Do what the buttons of an HTML panel ask for (actions.js). `notice`: where mistakes are shown."""

        def pressed(followed: str | None, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
            data = event._data if isinstance(event._data, dict) else {}
            action, job, value = (str(data.get(name) or "") for name in ("action", "job", "value"))
            return self.run(lambda: self.actions.act(action, job, value, followed, owner_of(request)), notice)

        panel.click(pressed, [self.followed], [notice, *self.outputs], **SILENT_EVENT).then(**refresh)


def build(page: Page) -> None:
    """Add the tab's components and events. Other tabs find its form at `page.form`."""
    does = Handlers(page)
    # Key and secret are fixed, so that a page re-attaches after a restart; what they hide is no secret.
    followed = gr.BrowserState(None, storage_key="lvdm-followed", secret="lvdm-app")
    draft = gr.BrowserState(None, storage_key="lvdm-draft", secret="lvdm-app")  # a reload loses nothing that was typed
    editing = gr.State("")
    with gr.Row(elem_classes="lv-main", equal_height=False):
        with gr.Column(scale=4, min_width=320, elem_id="form"):
            fields, others = make_fields(does.first, does.own, page.service.config)
            with gr.Column(elem_id="ask"):
                notice = gr.HTML("", elem_id="notice")
                check = gr.HTML("", elem_id="check", js_on_load=read_static("generate.js"))
                with gr.Row(elem_id="go"):
                    submit = gr.Button(GENERATE, variant="primary", size="lg", elem_id="generate", scale=3)
                    leave = gr.Button("Discard", size="lg", elem_id="leave-edit", visible=False, scale=1)
        with gr.Column(scale=5, min_width=320, elem_id="watch"):
            player = gr.HTML(
                views.player(None),
                html_template=read_static("player.html"),
                js_on_load=read_static("player.js"),
                elem_id="player",
            )
            status = gr.HTML(views.status(None), elem_id="status")
            said = gr.HTML("", elem_id="said")
            about = gr.HTML("", js_on_load=read_static("actions.js"), elem_id="about")
            line = gr.HTML("", js_on_load=read_static("actions.js"), elem_id="queue")

    refresh = page.poll(does.update, [followed], [player, status, about, line])
    assert page.tabs is not None
    form = Form(does.actions, fields, followed, editing, notice, submit, leave, page.tabs, refresh)
    page.form = form
    gr.on([fields[name].change for name in NAMES], does.typed, form.inputs, [check, draft], trigger_mode="always_last",
          **AS_GIVEN)
    page.blocks.load(does.kept, [draft], form.inputs, **SILENT_EVENT).then(does.check, form.inputs, [check], **AS_GIVEN)
    about.change(does.check, form.inputs, [check], **AS_GIVEN)  # a video that was made is a figure for the estimate

    def on_submit(request: gr.Request, followed: str | None, editing: str, *values: Any) -> dict[Any, Any]:
        given = dict(zip(NAMES, values, strict=True))
        return form.run(lambda: does.actions.generate(given, followed, editing, owner_of(request)), notice)

    def on_discard() -> dict[Any, Any]:
        return form.update(PageUpdate(editing="", values=does.first, show=True))

    submit.click(on_submit, [followed, editing, *form.inputs], form.outputs, **AS_GIVEN).then(**refresh)
    leave.click(on_discard, None, form.outputs, **SILENT_EVENT)
    for panel in about, line:
        form.listen(panel, said, refresh)
    _wire(page, does, fields, others, notice)


def _wire(page: Page, does: Handlers, f: dict[str, Any], o: dict[str, Any], notice: gr.HTML) -> None:
    """Connect the events that fill and show fields."""
    f["begin"].change(does.begins, [f["begin"]], [o["bring"], o["go_on"], f["job"]], **SILENT_EVENT)
    f["size"].change(lambda size: gr.update(visible=size == CUSTOM), [f["size"]], [o["sides"]], **SILENT_EVENT)
    f["pipeline"].change(does.sizes, [f["pipeline"]], [f["size"], f["frame_rate"]], **SILENT_EVENT)
    o["file"].upload(does.bring, [o["file"]], [f["upload"], o["file"], notice], **FILES)
    f["upload"].change(does.brought, [f["upload"]], [o["brought"]], **SILENT_EVENT)
    o["last"].click(does.last, None, [f["job"]], **SILENT_EVENT)
    o["random"].click(lambda: "", None, [f["seed"]], **SILENT_EVENT)
    o["reuse"].click(does.last_seed, None, [f["seed"]], **SILENT_EVENT)
    o["examples"].click(does.example, None, [f["prompt"]], **SILENT_EVENT)
    page.blocks.load(does.choices, None, [f["pipeline"], f["job"]], **SILENT_EVENT)


class Handlers:
    """The form's events that need the server."""

    def __init__(self, page: Page) -> None:
        self.service, self.actions = page.service, GenerateActions(page.service)
        try:
            self.own = self.actions.card({})
        except UserError:  # the checkpoint is gone: the form can be shown, and says so when it is used
            self.own = PipelineSpec("")
        self.first = first_values(page.service, self.own)

    def update(self, followed: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Return the player's value, the status, the details and the queue as the store has them now."""
        owner, service = owner_of(request), self.service
        job = self.actions.current_job(followed, owner)
        turns = turns_of(service, owner)
        turn = next((turn for turn in turns if job is not None and turn.job.id == job.id), None)
        preview = job is not None and self._has_preview(job)
        panel = queue(turns, service.store.get_value("worker"), job.id if job else "")
        before, starts = (turn.before, turn.starts) if turn else (0, None)
        return views.player(job, preview), views.status(job, before, starts, preview), views.about(job), panel

    def _has_preview(self, job: Job) -> bool:
        if job.state is not JobState.RUNNING or job.progress.phase == "writing":  # then it is removed
            return False
        return self.service.job_files.public_file(job, "preview.webp") is not None

    def check(self, request: gr.Request, *values: Any) -> str:
        return hint(dict(zip(NAMES, values, strict=True)), self.service.services, owner_of(request))

    def typed(self, request: gr.Request, *values: Any) -> tuple[str, Any]:
        """Return the check, and the draft that the browser keeps."""
        return self.check(request, *values), list(values)

    def kept(self, draft: Any) -> list[Any]:
        """Restore the draft. Fields that have their default are not sent: the user may be typing by now."""
        given = draft if isinstance(draft, list) and len(draft) == len(NAMES) else self.first.values()
        values = from_draft(dict(zip(NAMES, given, strict=True)), self.first)
        return [gr.skip() if value == self.first[name] else value for name, value in values.items()]

    def begins(self, begin: str, request: gr.Request) -> tuple[Any, ...]:
        videos = gr.update(choices=self._videos(request)) if begin == HISTORY else gr.skip()
        return gr.update(visible=begin == FILE), gr.update(visible=begin == HISTORY), videos

    def choices(self, request: gr.Request) -> tuple[Any, Any]:
        """Return the checkpoints and videos that can be chosen."""
        found = self.service.services.assets.list("pipeline")
        places = [(f"{asset.name} ({asset.detail})" if asset.detail else asset.name, asset.id) for asset in found]
        return gr.update(choices=[AS_SET, ("the app's own", DEFAULT_PIPELINE), *places]), gr.update(
            choices=self._videos(request)
        )

    def _videos(self, request: gr.Request) -> list[tuple[str, str]]:
        return own_videos(self.service.history(owner_of(request), kinds=[JobKind.GENERATE], limit=60))

    def sizes(self, pipeline: str | None) -> tuple[Any, Any]:
        card = self.actions.card({"pipeline": pipeline or ""})
        return (gr.update(choices=sizes(card, self.service.config.max_side)),
                gr.update(placeholder=f"{card.frame_rate:g}, the model's"))

    def bring(self, file: Any, request: gr.Request) -> tuple[Any, ...]:
        """Keep an uploaded file."""
        if not file:
            return gr.skip(), gr.skip(), ""
        try:
            upload = self.service.services.uploads.add(*uploaded(file), owner_of(request))
        except UserError as error:
            return "", None, error_html(error)
        return upload.id, None, ""

    def brought(self, upload_id: str, request: gr.Request) -> str:
        """Describe the file that the video starts from."""
        if not upload_id:
            return ""
        try:
            upload = self.service.services.uploads.find(upload_id, owner_of(request))
        except UserError as error:
            return error_html(error)
        details = f"{'picture' if upload.kind == 'image' else upload.kind}, {upload.width}x{upload.height}"
        details += f", {upload.seconds:.1f} s" if upload.kind == "video" and upload.seconds else ""
        return render("form.html", "upload", upload.name, details, thumbnail(upload.path, upload.kind))

    def last(self, request: gr.Request) -> Any:
        videos = self._videos(request)
        return gr.update(choices=videos, value=videos[0][1]) if videos else gr.skip()

    def last_seed(self, request: gr.Request) -> str:
        return self.actions.last_seed(owner_of(request))

    def example(self, event: gr.EventData) -> Any:
        number = str(event._data.get("job")) if isinstance(event._data, dict) else ""
        prompts = {str(i): prompt for i, prompt in enumerate(EXAMPLES.values())}
        return prompts.get(number, gr.skip())
