"""The Settings tab: the model, device and precision of all jobs, and the theme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field

from app.api.service import JobService
from app.tasks.generate import DEFAULT_PIPELINE, pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from app.tasks.validation import checked
from app.ui.html.templates import render
from app.ui.page import SILENT_EVENT, Page, error_html
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes
from odvae.utils.precision_names import PRECISIONS, Precision

AUTO = "auto"
TILES = [("automatic: fits the free memory", 0), *((f"{side} x {side} pixels", side)
                                                              for side in (64, 128, 192, 256, 384, 512, 768))]
GIB = 2**30


class Options(BaseModel):
    """The values in the store under "options", which the worker reads before every job."""

    model_config = ConfigDict(extra="forbid")

    pipeline: str = Field(DEFAULT_PIPELINE, max_length=64)  # or the id of an asset
    device: Literal["auto", "cpu"] = "auto"
    precision: Precision = "auto"
    offload: Literal["none", "model", "sequential"] = "none"
    tile: int | None = Field(None, ge=64, le=4096)
    max_disk: int = Field(20 * GIB, ge=0)  # bytes of the history


def build(page: Page) -> None:
    """Add the tab's components and events."""
    handlers = Settings(page.service)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            gr.HTML('<h2 class="lv-title">Model</h2>')
            pipeline = gr.Dropdown(handlers.pipelines(), value=DEFAULT_PIPELINE, label="Pipeline",
                                   elem_id="set-pipeline", info="used unless a video's settings name another")
            refresh = gr.Button("Refresh list", size="sm", elem_id="set-refresh")
            with gr.Row():
                device = gr.Dropdown([("accelerator, if available", "auto"), ("CPU", "cpu")], value="auto",
                                     label="Device", elem_id="set-device")
                precision = gr.Dropdown(
                    [("automatic", "auto"), *((name, name) for name in PRECISIONS[1:])], value="auto",
                    label="Precision", elem_id="set-precision",
                    info="automatic: bfloat16 on an accelerator, float32 on a CPU; another gives other pixels")
            gr.HTML('<h2 class="lv-title">Memory</h2>')
            offload = gr.Dropdown(
                [("keep all on the accelerator", "none"), ("each model only while it runs", "model"),
                 ("one block at a time (slow)", "sequential")],
                value="none", label="Offload", elem_id="set-offload", info="no effect on a CPU")
            tile = gr.Dropdown(TILES, value=0, label="Decoding tiles", elem_id="set-tile",
                               info="smaller ones are used when memory runs out")
            disk = gr.Number(20, minimum=0, maximum=10**6, label="History limit (GiB; 0: none)",
                             elem_id="set-disk", info="beyond it the oldest jobs are deleted, never a favorite")
            save = gr.Button("Save", variant="primary", elem_id="set-save")
            notice = gr.HTML("", elem_id="set-notice")
        with gr.Column(min_width=320):
            gr.HTML('<h2 class="lv-title">Appearance</h2>')
            theme = gr.Radio(["system", "light", "dark"], value="system", label="Theme",
                             elem_id="set-theme", info="in this browser")
            gr.HTML('<h2 class="lv-title">This server</h2>')
            facts = gr.HTML("", elem_id="set-facts")
            gr.HTML(KEYS)
    form = [pipeline, device, precision, offload, tile, disk]
    page.blocks.load(handlers.read, None, form, **SILENT_EVENT)
    page.blocks.load(None, None, [theme], js="() => window.lvdmChosenTheme()", **SILENT_EVENT)
    theme.input(None, [theme], None, js="chosen => { window.lvdmTheme(chosen); }", **SILENT_EVENT)
    refresh.click(handlers.refresh, None, [pipeline], **SILENT_EVENT)
    save.click(handlers.save, form, [notice], **SILENT_EVENT)
    page.poll(handlers.facts, [], [facts])


class Settings:
    def __init__(self, service: JobService) -> None:
        self.service, self.store = service, service.store

    def pipelines(self) -> list[tuple[str, str]]:
        pipelines = self.service.services.assets.list("pipeline")
        return [
            ("the app's default", DEFAULT_PIPELINE),
            *((f"{asset.name}  ({asset.detail})", asset.id) for asset in pipelines),
        ]

    def refresh(self) -> Any:
        return gr.Dropdown(choices=self.pipelines())

    def read(self) -> tuple[Any, ...]:
        options = Options.model_validate(
            {"max_disk": self.service.config.max_disk, **(self.store.get_value("options") or {})}
        )
        choices = self.pipelines()
        known = options.pipeline if options.pipeline in [value for _, value in choices] else DEFAULT_PIPELINE
        return (gr.Dropdown(choices=choices, value=known), options.device, options.precision, options.offload,
                options.tile or 0, round(options.max_disk / GIB, 2))  # fmt: skip

    def save(self, pipeline: str, device: str, precision: str, offload: str, tile: int, disk: float) -> str:
        try:
            options = checked(Options, {
                "pipeline": pipeline or DEFAULT_PIPELINE, "device": device, "precision": precision, "offload": offload,
                "tile": tile or None, "max_disk": int((disk or 0) * GIB)})
            spec = load_pipeline_spec(pipeline_folder(options.pipeline, self.service.services))
        except UserError as error:
            return error_html(error)
        self.store.set_value("options", options.model_dump())
        return render("form.html", "saved", f"Saved. The next job uses {spec.name}.")

    def facts(self, request: gr.Request) -> str:
        try:
            spec = load_pipeline_spec(pipeline_folder("", self.service.services))
            model = (f"{spec.name}: {spec.width}x{spec.height} pixels, {spec.frame_rate:g} fps, "
                     f"{spec.lengths} frames, sides in steps of {spec.size_multiple}")
        except UserError as error:
            model = str(error)
        workers = self.store.workers() or [{"number": 0, "state": "starting"}]
        names = ["Worker"] if len(workers) == 1 else [f"Worker {worker['number']}" for worker in workers]
        rows = {**dict(zip(names, map(describe_worker, workers), strict=True)), "Model": model,
                "Data": str(self.service.job_files.root),
                "Folders": ", ".join(str(root) for root in self.service.services.config.roots()),
                "Longest video": f"{self.service.config.max_seconds:g} s",
                "Largest upload": format_bytes(self.service.config.max_upload)}
        return render("form.html", "facts", rows)


def describe_worker(worker: Mapping[str, Any]) -> str:
    """Describe the state of a worker in words."""
    states = {"ready": "ready", "loading": "loading the model", "restarting": "restarting after a crash"}
    device = f" on {worker['device']}" if worker.get("device") else ""
    process = f" (process {worker['pid']})" if worker.get("pid") else ""
    return f"{states.get(worker['state'], 'starting')}{device}{process} {worker.get('error', '')}".rstrip()


KEYS = """<h2 class="lv-title">Keys</h2><table class="lv-facts"><tr><th><kbd>Ctrl</kbd> <kbd>Enter</kbd></th>
<td>generate, wherever the cursor is in the form</td></tr></table>"""
