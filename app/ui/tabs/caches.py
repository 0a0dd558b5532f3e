"""The Caches tab: latent caches are built and inspected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.storage.jobs import Job, JobKind
from app.ui.html.job_list import choices, job_list_panel, metric_grid, picture, report, submit
from app.ui.html.templates import render
from app.ui.page import SILENT_EVENT, Page, error_html
from odvae.utils.errors import UserError
from odvae.utils.format import format_bytes

NEW = ("A new cache", "")
NATURAL = ("natural (shipped, 16 channels), or the cache's own", "")
POLICIES = [("Back to back", "back-to-back"), ("One every N seconds", "every"), ("N per video", "uniform"),
            ("Each video as one clip", "whole"), ("Back to back within scenes", "scenes")]  # fmt: skip
EMPTY = "No caches yet. Pick a folder of videos, give the cache a name, and try a dry run first."


def build(page: Page) -> None:
    """Add the tab's components and events."""
    with gr.Row(equal_height=False, elem_classes="lw-tab"):
        with gr.Column(scale=4, min_width=320):
            source = gr.Dropdown(choices(page, "videos"), label="Videos", value=None, elem_id="cache-source",
                                 info="folders and lists below the app's --folder")
            into = gr.Dropdown(choices(page, "cache", [NEW]), label="Target cache", value="", elem_id="cache-target")
            with gr.Group() as fresh:
                name = gr.Textbox(label="Name", max_lines=1, elem_id="cache-name",
                                  placeholder="letters, digits, dots, - and _")
                with gr.Row():
                    sizes = gr.Textbox("64x64", label="Sizes", max_lines=1, elem_id="cache-sizes", min_width=130,
                                       info="height x width")
                    frames = gr.Textbox("33", label="Frames per clip", max_lines=1, elem_id="cache-frames",
                                        min_width=130, info="1 + 4k")
                    rate = gr.Number(8, label="Frame rate", minimum=0.1, maximum=120, elem_id="cache-rate",
                                     min_width=130)
            with gr.Row():
                policy = gr.Dropdown(POLICIES, label="Clips", value="back-to-back", min_width=180,
                                     elem_id="cache-clips")
                amount = gr.Number(4, label="N", minimum=0, elem_id="cache-amount", min_width=80, visible=False)
            with gr.Accordion("More", open=False, elem_id="cache-more"):
                vae = gr.Dropdown(choices(page, "vae", [NATURAL]), label="OD-VAE", value="", elem_id="cache-vae")
                with gr.Row():
                    store = gr.Dropdown([("The mean", "mean"), ("Mean and variance", "moments")], label="Store",
                                        value="mean", elem_id="cache-store", min_width=150)
                    dtype = gr.Dropdown(["float16", "bfloat16", "float32"], label="Precision", value="float16",
                                        elem_id="cache-dtype", min_width=110)
                with gr.Row():
                    batch = gr.Number(8, label="Batch size", precision=0, elem_id="cache-batch", min_width=110)
                    shard = gr.Number(128, label="Clips per shard", precision=0, elem_id="cache-shard", min_width=110,
                                      info="an interruption loses at most one shard")
                    patience = gr.Number(120, label="Seconds per file", elem_id="cache-patience", min_width=110)
                truncated = gr.Checkbox(False, label="Use the readable part of truncated files",
                                        elem_id="cache-truncated")
                retry = gr.Checkbox(False, label="Retry rejected files", elem_id="cache-retry")
            with gr.Row():
                dry_run = gr.Button("Dry run", elem_id="cache-dry-run", min_width=120)
                build = gr.Button("Build", variant="primary", elem_id="cache-build", min_width=120)
            with gr.Group():
                known = gr.Dropdown(choices(page, "cache"), label="Existing cache", value=None,
                                    elem_id="cache-existing")
                with gr.Row():
                    inspect = gr.Button("Inspect", elem_id="cache-inspect", min_width=120)
                    refresh = gr.Button("Refresh lists", elem_id="cache-refresh", min_width=120)
        with gr.Column(scale=5, min_width=320):
            chosen, event, notice = job_list_panel(page, JobKind.CACHE, "cache", detail, EMPTY)

    def ask(dry_run: bool, form: Sequence[Any], request: gr.Request) -> tuple[Any, str]:
        try:
            return submit(page, JobKind.CACHE, to_params(*form) | {"dry_run": dry_run}, request)
        except UserError as error:
            return gr.skip(), error_html(error)

    def on_dry_run(request: gr.Request, *form: Any) -> tuple[Any, str]:
        return ask(True, form, request)

    def on_build(request: gr.Request, *form: Any) -> tuple[Any, str]:
        return ask(False, form, request)

    def on_inspect(request: gr.Request, cache: str | None) -> tuple[Any, str]:
        return submit(page, JobKind.CACHE, {"inspect": True, "cache": cache or ""}, request)

    def lists() -> tuple[Any, ...]:
        return (gr.Dropdown(choices=choices(page, "videos")), gr.Dropdown(choices=choices(page, "cache", [NEW])),
                gr.Dropdown(choices=choices(page, "vae", [NATURAL])), gr.Dropdown(choices=choices(page, "cache")))

    def refresh_lists() -> tuple[Any, ...]:
        page.service.services.assets.invalidate()
        return lists()

    form = [source, into, name, sizes, frames, rate, policy, amount, vae, store, dtype, batch, shard, patience,
            truncated, retry]  # fmt: skip
    dry_run.click(on_dry_run, form, [chosen, notice], **SILENT_EVENT).success(**event)
    build.click(on_build, form, [chosen, notice], **SILENT_EVENT).success(**event)
    inspect.click(on_inspect, [known], [chosen, notice], **SILENT_EVENT).success(**event)
    refresh.click(refresh_lists, None, [source, into, vae, known], **SILENT_EVENT)
    page.blocks.load(lists, None, [source, into, vae, known], **SILENT_EVENT)
    into.change(lambda cache: gr.Group(visible=not cache), [into], [fresh], **SILENT_EVENT)
    policy.change(lambda kind: gr.Number(visible=kind in ("every", "uniform")), [policy], [amount], **SILENT_EVENT)


def to_params(source: str | None, into: str | None, name: str, sizes: str, frames: str, rate: float, policy: str,
           amount: float, vae: str | None, store: str, dtype: str, batch: int, shard: int, patience: float,
           truncated: bool, retry: bool) -> dict[str, Any]:
    """Return the params that the form asks for. Raises UserError for invalid sizes and lengths."""
    raw: dict[str, Any] = {
        "source": source or "", "vae": vae or "", "clips": f"{policy}:{amount or 0:g}" if policy in ("every", "uniform")
        else policy, "batch": batch, "shard_clips": shard, "file_seconds": patience, "keep_truncated": truncated,
        "retry": retry}
    if into:
        return raw | {"cache": into}
    return raw | {"name": (name or "").strip(), "sizes": sizes_of(sizes), "frames": lengths_of(frames),
                  "frame_rate": rate, "store": store, "dtype": dtype}


def sizes_of(written: str) -> list[tuple[int, int]]:
    """Parse sizes such as "64x64, 96x64". Raises UserError."""
    found = [re.fullmatch(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})", part) for part in re.split(r"\s*[,;]\s*", written.strip())]
    if not all(found):
        raise UserError("Sizes: write height x width, such as 64x64 or 64x64, 96x64.")
    return [(int(one[1]), int(one[2])) for one in found if one]


def lengths_of(written: str) -> list[int]:
    """Parse lengths such as "17, 33". Raises UserError."""
    parts = re.split(r"[\s,;]+", written.strip())
    if not all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        raise UserError("Frames per clip: write numbers such as 33, or 17, 33.")
    return [int(part) for part in parts]


def detail(job: Job) -> str:
    """Return what a build, a dry run or an inspection found as HTML."""
    found = job.result
    metrics: dict[str, str] = {}
    if "clips" in found:
        metrics["clips"] = f"{found['clips']:,}"
    if found.get("bytes"):
        metrics |= {"on disk": format_bytes(found["bytes"]), "as raw video": format_bytes(found["raw_bytes"]),
                 "smaller by": f"{found['ratio']:.0f} times"}
    if found.get("frames_per_second"):
        metrics["speed"] = f"{found['frames_per_second']:.0f} frames/s"
    aside = found.get("rejected") or []
    if aside:
        metrics["rejected"] = str(sum(count for _, count in aside))
    parts = [metric_grid(metrics)]
    if found.get("sheet"):
        parts.append(picture(job, "sheet.webp", "Clips decoded from the cache"))
    parts.append(report("Dry run" if job.params.get("dry_run") else "Build report",
                        found.get("report") or []))
    parts.append(report("Statistics", found.get("stats") or []))
    if found.get("rejects"):
        parts.append(render("job_list.html", "rejects", [f"{count} {kind}" for kind, count in aside], found["rejects"]))
    return "".join(parts)
