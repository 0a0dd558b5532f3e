"""The Compress tab: a video and its OD-VAE reconstruction, compared under a slider."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import gradio as gr

from app.api.service import JobAction, JobService
from app.storage.jobs import JobKind, JobState
from app.tasks.compress import fit_size, find_source, validate
from app.ui.html import comparison as render
from app.ui.html.labels import format_date
from app.ui.page import FILES, SILENT_EVENT, Page, error_html, owner_of, read_static, uploaded
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes, format_duration

NEWEST = 12  # compressions in the list
OFFERED = 40  # videos of the history that can be picked
AS_IT_IS = "original"
SHORT = (720, 480, 360, 256, 128)  # pixels: short sides that are offered
TILES: dict[str, str | int | None] = {
    "automatic: where whole frames do not fit": "auto", "whole frames": None,
    **{f"{side} pixels a side": side for side in (512, 384, 256, 192, 128, 96, 64)},
}  # fmt: skip
NATURAL = ("natural (built in)", "")


def build(page: Page) -> None:
    """Add the tab's components and events."""
    does = Handlers(page.service)
    chosen = gr.State({})  # {"upload": id} or {"job": id}
    shown = gr.State("")  # the job that is shown; "": the newest
    with gr.Row(equal_height=False, elem_classes="lv-main"):
        with gr.Column(scale=4, min_width=300):
            video = gr.File(label=f"Video ({does.limits})", file_types=["video", ".gif"], height=160,
                            elem_id="compress-file")  # fmt: skip
            made = gr.Dropdown([], value=None, label="Or a video of the history", elem_id="compress-made")
            hint = gr.HTML("", elem_id="compress-hint")
            with gr.Group():
                with gr.Row():
                    size = gr.Dropdown(
                        [AS_IT_IS, *(f"{side} short side" for side in SHORT)], value=AS_IT_IS, label="Size",
                        info="or width x height", allow_custom_value=True, min_width=140, elem_id="compress-size",
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
            press = gr.Button("Compress", variant="primary", size="lg", elem_id="compress-press")
            notice = gr.HTML("", elem_id="compress-notice")
        with gr.Column(scale=6, min_width=300):
            view = gr.HTML(render.view(None), html_template=render.VIEWER, js_on_load=read_static("compress.js"),
                           elem_id="compress-view", padding=False)  # fmt: skip
            status = gr.HTML(render.status(None), js_on_load=read_static("compress.js"), elem_id="compress-status",
                             padding=False)  # fmt: skip
    recent = gr.HTML("", js_on_load=read_static("compress.js"), elem_id="compress-recent", padding=False)

    refresh = page.poll(does.update, [shown], [view, status, recent, made])
    page.blocks.load(does.vaes, None, [vae], **SILENT_EVENT)  # not at every tick: it scans folders
    form = [chosen, vae, size, start, seconds, rate, tile]
    ask = {"fn": does.hint, "inputs": form, "outputs": [hint, notice], **SILENT_EVENT}
    video.upload(does.take, [video], [chosen, made, notice], **FILES).success(**ask)
    video.clear(lambda: ({}, "", ""), None, [chosen, hint, notice], **SILENT_EVENT)
    made.input(does.pick, [made], [chosen, video], **SILENT_EVENT).success(**ask)
    for field in (size, start, seconds, rate, tile, vae):
        field.change(**ask)
    press.click(does.compress, form, [shown, notice], **SILENT_EVENT).success(**refresh)
    for panel in (status, recent):
        panel.click(does.act, [shown], [shown, notice], **SILENT_EVENT).success(**refresh)


class Handlers:
    """The tab's events."""

    def __init__(self, service: JobService) -> None:
        self.service = service

    @property
    def limits(self) -> str:
        """The limits of an upload in words."""
        config = self.service.config
        return f"at most {format_bytes(config.max_upload)} and {format_duration(config.max_upload_seconds)}"

    def update(self, shown: str, request: gr.Request) -> tuple[Any, ...]:
        """Return the viewer's value, the panel below it, the list, and the videos that can be picked."""
        owner = owner_of(request)
        jobs = self.service.history(owner, kinds=[JobKind.COMPRESS], limit=NEWEST)
        job = jobs[0] if jobs else None
        if shown:
            with suppress(UserError):  # deleted meanwhile, in another tab
                job = self.service.find(shown, owner)
        ahead = 0
        if job is not None and job.state is JobState.QUEUED:
            ahead = next((before for before, one in self.service.queue(owner) if one.id == job.id), 0)
        made = self.service.history(owner, kinds=[JobKind.GENERATE, JobKind.DECODE],
                                    states=[JobState.DONE, JobState.STOPPED], limit=OFFERED)  # fmt: skip
        videos = [(f"{one.title[:70]} ({format_date(one.created)})", one.id) for one in made
                  if self.service.job_files.public_file(one, "final.mp4")]  # fmt: skip
        return (render.view(job), render.status(job, ahead), render.recent_compressions(jobs, job.id if job else ""),
                gr.update(choices=videos, visible=bool(videos)))  # fmt: skip

    def vaes(self) -> dict[str, Any]:
        """List the VAEs that can be picked."""
        found = [(asset.name, asset.id) for asset in self.service.services.assets.list("vae")]
        return gr.update(choices=[NATURAL, *found])

    def take(self, file: Any, request: gr.Request) -> tuple[Any, ...]:
        """Keep an uploaded file. Return what is chosen now, no video of the history, and a notice."""
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

    def raw(self, owner: str, chosen: dict[str, str], vae: str, size: str, start: str, seconds: str, rate: str,
            tile: str) -> dict[str, Any]:  # fmt: skip
        """Return the params that the form asks for; what is no number stays text, which `validate` refuses."""
        given: dict[str, Any] = {**chosen, "vae": vae or "", "start": start.strip() or 0.0,
                                 "seconds": seconds.strip() or None, "frame_rate": rate.strip() or None,
                                 "tile": TILES.get(tile, tile)}  # fmt: skip
        wanted = str(size or AS_IT_IS).strip().lower()
        if wanted == AS_IT_IS:
            return given
        width, by, height = wanted.replace("×", "x").partition("x")
        if by:
            return {**given, "width": width.strip(), "height": height.strip()}
        short = wanted.removesuffix("short side").strip()
        if not short.isascii() or not short.isdigit() or not 0 < int(short[:6]) < 10**5:
            raise UserError(f"Size: {wanted[:40]!r} is no size. Choose one, or write width x height: 640x360.")
        source = find_source({**chosen}, self.service.services, owner)
        found = fit_size(source.height, source.width, self.service.config.max_side, int(short))
        return {**given, "height": found[0], "width": found[1]}

    def settled(self, owner: str, *form: Any) -> tuple[dict[str, Any], str]:
        if not form[0]:
            raise UserError("Choose a video first: upload one, or pick one of the history.")
        return validate(self.raw(owner, *form), self.service.services, owner)

    def hint(self, request: gr.Request, *form: Any) -> tuple[str, Any]:
        """Return what the settings come to, or what is wrong with them, while they are typed."""
        if not form[0]:
            return "", gr.skip()  # it may say why the file was not taken
        owner = owner_of(request)
        try:
            params, name = self.settled(owner, *form)
            source = find_source({key: params[key] for key in ("upload", "job")}, self.service.services, owner)
        except UserError as error:
            return "", error_html(error)
        return render.hint(params, name, source), ""

    def compress(self, request: gr.Request, *form: Any) -> tuple[Any, str]:
        """Queue the job. Return the job to show and a notice."""
        owner = owner_of(request)
        try:
            params, _ = self.settled(owner, *form)
            return self.service.submit(JobKind.COMPRESS, params, owner).id, ""
        except UserError as error:
            return gr.skip(), error_html(error)

    def act(self, shown: str, event: gr.EventData, request: gr.Request) -> tuple[Any, str]:
        """Do what a button of a job asks for."""
        owner, data = owner_of(request), event._data if isinstance(event._data, dict) else {}
        try:
            job_id, action = str(data.get("job", "")), str(data.get("action", ""))
            if action == "open":
                return self.service.find(job_id, owner).id, ""
            job = self.service.act(job_id, action, owner)
        except UserError as error:
            return shown, error_html(error)
        if action == JobAction.DELETE:
            return "" if shown == job.id else shown, ""
        return job.id, ""
