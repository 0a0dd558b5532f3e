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
            target = gr.Dropdown(choices(page, "cache", [NEW]), label="Target cache", value="", elem_id="cache-target")
            with gr.Group() as new_cache:
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
                    timeout = gr.Number(120, label="Timeout per file (s)", elem_id="cache-timeout", min_width=110)
                truncated = gr.Checkbox(False, label="Use the readable part of truncated files",
                                        elem_id="cache-truncated")
                retry = gr.Checkbox(False, label="Retry rejected files", elem_id="cache-retry")
            with gr.Row():
                dry_run = gr.Button("Dry run", elem_id="cache-dry-run", min_width=120)
                build = gr.Button("Build", variant="primary", elem_id="cache-build", min_width=120)
            with gr.Group():
                existing = gr.Dropdown(choices(page, "cache"), label="Existing cache", value=None,
                                    elem_id="cache-existing")
                with gr.Row():
                    inspect = gr.Button("Inspect", elem_id="cache-inspect", min_width=120)
                    refresh = gr.Button("Refresh lists", elem_id="cache-refresh", min_width=120)
        with gr.Column(scale=5, min_width=320):
            selected, event, notice = job_list_panel(page, JobKind.CACHE, "cache", detail, EMPTY)

    def submit_form(dry_run: bool, form: Sequence[Any], request: gr.Request) -> tuple[Any, str]:
        try:
            return submit(page, JobKind.CACHE, to_params(*form) | {"dry_run": dry_run}, request)
        except UserError as error:
            return gr.skip(), error_html(error)

    def on_dry_run(request: gr.Request, *form: Any) -> tuple[Any, str]:
        return submit_form(True, form, request)

    def on_build(request: gr.Request, *form: Any) -> tuple[Any, str]:
        return submit_form(False, form, request)

    def on_inspect(request: gr.Request, cache: str | None) -> tuple[Any, str]:
        return submit(page, JobKind.CACHE, {"inspect": True, "cache": cache or ""}, request)

    def list_choices() -> tuple[Any, ...]:
        return (gr.Dropdown(choices=choices(page, "videos")), gr.Dropdown(choices=choices(page, "cache", [NEW])),
                gr.Dropdown(choices=choices(page, "vae", [NATURAL])), gr.Dropdown(choices=choices(page, "cache")))

    def refresh_lists() -> tuple[Any, ...]:
        page.service.services.assets.invalidate()
        return list_choices()

    form = [source, target, name, sizes, frames, rate, policy, amount, vae, store, dtype, batch, shard, timeout,
            truncated, retry]  # fmt: skip
    dry_run.click(on_dry_run, form, [selected, notice], **SILENT_EVENT).success(**event)
    build.click(on_build, form, [selected, notice], **SILENT_EVENT).success(**event)
    inspect.click(on_inspect, [existing], [selected, notice], **SILENT_EVENT).success(**event)
    refresh.click(refresh_lists, None, [source, target, vae, existing], **SILENT_EVENT)
    page.blocks.load(list_choices, None, [source, target, vae, existing], **SILENT_EVENT)
    target.change(lambda cache: gr.Group(visible=not cache), [target], [new_cache], **SILENT_EVENT)
    policy.change(lambda kind: gr.Number(visible=kind in ("every", "uniform")), [policy], [amount], **SILENT_EVENT)


def to_params(source: str | None, target: str | None, name: str, sizes: str, frames: str, rate: float, policy: str,
           amount: float, vae: str | None, store: str, dtype: str, batch: int, shard: int, timeout: float,
           truncated: bool, retry: bool) -> dict[str, Any]:
    """Return the form's values as params. Raises UserError for invalid sizes and lengths."""
    raw: dict[str, Any] = {
        "source": source or "", "vae": vae or "", "clips": f"{policy}:{amount or 0:g}" if policy in ("every", "uniform")
        else policy, "batch": batch, "shard_clips": shard, "file_seconds": timeout, "keep_truncated": truncated,
        "retry": retry}
    if target:
        return raw | {"cache": target}
    return raw | {"name": (name or "").strip(), "sizes": parse_sizes(sizes), "frames": parse_lengths(frames),
                  "frame_rate": rate, "store": store, "dtype": dtype}


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Parse sizes such as "64x64, 96x64". Raises UserError."""
    matches = [re.fullmatch(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})", part) for part in re.split(r"\s*[,;]\s*", text.strip())]
    if not all(matches):
        raise UserError("Sizes: write height x width, such as 64x64 or 64x64, 96x64.")
    return [(int(match[1]), int(match[2])) for match in matches if match]


def parse_lengths(text: str) -> list[int]:
    """Parse lengths such as "17, 33". Raises UserError."""
    parts = re.split(r"[\s,;]+", text.strip())
    if not all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        raise UserError("Frames per clip: write numbers such as 33, or 17, 33.")
    return [int(part) for part in parts]


def detail(job: Job) -> str:
    """Return the results of a build, a dry run or an inspection as HTML."""
    result = job.result
    metrics: dict[str, str] = {}
    if "clips" in result:
        metrics["clips"] = f"{result['clips']:,}"
    if result.get("bytes"):
        metrics |= {"on disk": format_bytes(result["bytes"]), "as raw video": format_bytes(result["raw_bytes"]),
                 "compression": f"{result['ratio']:.0f} times"}
    if result.get("frames_per_second"):
        metrics["speed"] = f"{result['frames_per_second']:.0f} frames/s"
    rejected = result.get("rejected") or []
    if rejected:
        metrics["rejected"] = str(sum(count for _, count in rejected))
    parts = [metric_grid(metrics)]
    if result.get("sheet"):
        parts.append(picture(job, "sheet.webp", "Clips decoded from the cache"))
    parts.append(report("Dry run" if job.params.get("dry_run") else "Build report",
                        result.get("report") or []))
    parts.append(report("Statistics", result.get("stats") or []))
    if result.get("rejects"):
        kinds = [f"{count} {kind}" for kind, count in rejected]
        parts.append(render("job_list.html", "rejects", kinds, result["rejects"]))
    return "".join(parts)
