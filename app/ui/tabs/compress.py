"""The Compress tab: a video and its OD-VAE reconstruction, compared with a slider."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import gradio as gr

from app.api.service import JobAction, JobService
from app.storage.jobs import JobKind, JobState
from app.tasks.compress import find_source, fit_size, validate
from app.ui.html import comparison
from app.ui.html.labels import format_date
from app.ui.page import FILES, SILENT_EVENT, Page, error_html, owner_of, read_static, uploaded
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes, format_duration

RECENT = 12  # compressions in the list
MAX_VIDEOS = 40  # of the history that can be picked
ORIGINAL_SIZE = "original"
SHORT_SIDES = (720, 480, 360, 256, 128)  # pixels
TILES: dict[str, str | int | None] = {
    "automatic: where whole frames do not fit": "auto", "whole frames": None,
    **{f"{side} pixels a side": side for side in (512, 384, 256, 192, 128, 96, 64)},
}  # fmt: skip
NATURAL = ("natural (shipped)", "")


def build(page: Page) -> None:
    """Add the tab's components and events."""
    handlers = Handlers(page.service)
    source = gr.State({})  # {"upload": id} or {"job": id}
    selected = gr.State("")  # the id of the shown job; "": the newest
    with gr.Row(equal_height=False, elem_classes="lv-main"):
        with gr.Column(scale=4, min_width=300):
            video = gr.File(label=f"Video ({handlers.limits})", file_types=["video", ".gif"], height=160,
                            elem_id="compress-file")  # fmt: skip
            history_video = gr.Dropdown([], value=None, label="Or a video of the history", elem_id="compress-job")
            hint = gr.HTML("", elem_id="compress-hint")
            with gr.Group():
                with gr.Row():
                    size = gr.Dropdown(
                        [ORIGINAL_SIZE, *(f"{side} short side" for side in SHORT_SIDES)], value=ORIGINAL_SIZE,
                        label="Size", info="or width x height", allow_custom_value=True, min_width=140,
                        elem_id="compress-size",
                    )  # fmt: skip
                    vae = gr.Dropdown([NATURAL], value="", label="VAE", info="what encodes and decodes",
                                      min_width=140, elem_id="compress-vae")  # fmt: skip
                with gr.Row():
                    start = gr.Textbox(label="Start (s)", placeholder="0", max_lines=1, min_width=90,
                                       elem_id="compress-start")  # fmt: skip
                    seconds = gr.Textbox(label="Seconds", placeholder="all", max_lines=1, min_width=90,
                                         elem_id="compress-seconds")  # fmt: skip
                    rate = gr.Textbox(label="Frame rate", placeholder="original", max_lines=1, min_width=90,
                                      elem_id="compress-rate")  # fmt: skip
                tile = gr.Dropdown(list(TILES), value=next(iter(TILES)), label="Tiles", elem_id="compress-tile")
            button = gr.Button("Compress", variant="primary", size="lg", elem_id="compress-submit")
            notice = gr.HTML("", elem_id="compress-notice")
        with gr.Column(scale=6, min_width=300):
            view = gr.HTML(comparison.view(None), html_template=comparison.VIEWER,
                           js_on_load=read_static("compress.js"), elem_id="compress-view", padding=False)  # fmt: skip
            status = gr.HTML(comparison.status(None), js_on_load=read_static("compress.js"), elem_id="compress-status",
                             padding=False)  # fmt: skip
    recent = gr.HTML("", js_on_load=read_static("compress.js"), elem_id="compress-recent", padding=False)

    refresh = page.poll(handlers.update, [selected], [view, status, recent, history_video])
    page.blocks.load(handlers.vaes, None, [vae], **SILENT_EVENT)  # not at every tick: it scans folders
    form = [source, vae, size, start, seconds, rate, tile]
    update_hint = {"fn": handlers.hint, "inputs": form, "outputs": [hint, notice], **SILENT_EVENT}
    video.upload(handlers.accept_upload, [video], [source, history_video, notice], **FILES).success(**update_hint)
    video.clear(lambda: ({}, "", ""), None, [source, hint, notice], **SILENT_EVENT)
    history_video.input(handlers.pick, [history_video], [source, video], **SILENT_EVENT).success(**update_hint)
    for field in (size, start, seconds, rate, tile, vae):
        field.change(**update_hint)
    button.click(handlers.compress, form, [selected, notice], **SILENT_EVENT).success(**refresh)
    for panel in (status, recent):
        panel.click(handlers.act, [selected], [selected, notice], **SILENT_EVENT).success(**refresh)


class Handlers:
    """The tab's events."""

    def __init__(self, service: JobService) -> None:
        self.service = service

    @property
    def limits(self) -> str:
        """The limits of an upload in words."""
        config = self.service.config
        return f"at most {format_bytes(config.max_upload)} and {format_duration(config.max_upload_seconds)}"

    def update(self, selected: str, request: gr.Request) -> tuple[Any, ...]:
        """Return the viewer's value, the panel below it, the list, and the videos that can be picked."""
        owner = owner_of(request)
        jobs = self.service.history(owner, kinds=[JobKind.COMPRESS], limit=RECENT)
        job = jobs[0] if jobs else None
        if selected:
            with suppress(UserError):  # deleted meanwhile
                job = self.service.find(selected, owner)
        before = 0
        if job is not None and job.state is JobState.QUEUED:
            before = next((count for count, queued in self.service.queue(owner) if queued.id == job.id), 0)
        finished = self.service.history(owner, kinds=[JobKind.GENERATE, JobKind.DECODE],
                                    states=[JobState.DONE, JobState.STOPPED], limit=MAX_VIDEOS)  # fmt: skip
        videos = [(f"{video.title[:70]} ({format_date(video.created)})", video.id) for video in finished
                  if self.service.job_files.public_file(video, "final.mp4")]  # fmt: skip
        recent = comparison.recent_compressions(jobs, job.id if job else "")
        return (comparison.view(job), comparison.status(job, before), recent,
                gr.update(choices=videos, visible=bool(videos)))  # fmt: skip

    def vaes(self) -> dict[str, Any]:
        """List the VAEs that can be picked."""
        assets = [(asset.name, asset.id) for asset in self.service.services.assets.list("vae")]
        return gr.update(choices=[NATURAL, *assets])

    def accept_upload(self, file: Any, request: gr.Request) -> tuple[Any, ...]:
        """Accept an uploaded file. Return the new source, no video of the history, and a notice."""
        if not file:
            return {}, None, ""
        try:
            upload = self.service.services.uploads.add(*uploaded(file), owner_of(request))
            if upload.kind != "video":
                raise UserError(f"{upload.name}: this is a picture. Upload a video.")
        except UserError as error:
            return {}, None, error_html(error)
        return {"upload": upload.id}, None, ""

    def pick(self, job_id: str | None) -> tuple[Any, ...]:
        """Choose a video of the history instead of a file."""
        return ({"job": job_id} if job_id else {}), None

    def to_params(self, owner: str, source: dict[str, str], vae: str, size: str, start: str, seconds: str, rate: str,
            tile: str) -> dict[str, Any]:  # fmt: skip
        """Return the form's values as params; text that is no number is left to `validate`."""
        raw: dict[str, Any] = {**source, "vae": vae or "", "start": start.strip() or 0.0,
                                 "seconds": seconds.strip() or None, "frame_rate": rate.strip() or None,
                                 "tile": TILES.get(tile, tile)}  # fmt: skip
        choice = str(size or ORIGINAL_SIZE).strip().lower()
        if choice == ORIGINAL_SIZE:
            return raw
        width, separator, height = choice.replace("×", "x").partition("x")
        if separator:
            return {**raw, "width": width.strip(), "height": height.strip()}
        short = choice.removesuffix("short side").strip()
        if not short.isascii() or not short.isdigit() or not 0 < int(short[:6]) < 10**5:
            raise UserError(f"Size: {choice[:40]!r} is not a size. Choose one, or write width x height: 640x360.")
        video = find_source(source, self.service.services, owner)
        size_hw = fit_size(video.height, video.width, self.service.config.max_side, int(short))
        return {**raw, "height": size_hw[0], "width": size_hw[1]}

    def validate(self, owner: str, *form: Any) -> tuple[dict[str, Any], str]:
        if not form[0]:
            raise UserError("Choose a video first: upload one, or pick one of the history.")
        return validate(self.to_params(owner, *form), self.service.services, owner)

    def hint(self, request: gr.Request, *form: Any) -> tuple[str, Any]:
        """Return a summary of the settings, or what is invalid in them."""
        if not form[0]:
            return "", gr.skip()  # it may say why the file was refused
        owner = owner_of(request)
        try:
            params, name = self.validate(owner, *form)
            source = find_source({key: params[key] for key in ("upload", "job")}, self.service.services, owner)
        except UserError as error:
            return "", error_html(error)
        return comparison.hint(params, name, source), ""

    def compress(self, request: gr.Request, *form: Any) -> tuple[Any, str]:
        """Queue the job. Return the job to show and a notice."""
        owner = owner_of(request)
        try:
            params, _ = self.validate(owner, *form)
            return self.service.submit(JobKind.COMPRESS, params, owner).id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    def act(self, selected: str, event: gr.EventData, request: gr.Request) -> tuple[Any, str]:
        """Do the action of a job's button."""
        owner, data = owner_of(request), event._data if isinstance(event._data, dict) else {}
        try:
            job_id, action = str(data.get("job", "")), str(data.get("action", ""))
            if action == "open":
                return self.service.find(job_id, owner).id, ""
            job = self.service.act(job_id, action, owner)
        except UserError as error:
            return selected, error_html(error)
        if action == JobAction.DELETE:
            return "" if selected == job.id else selected, ""
        return job.id, ""
