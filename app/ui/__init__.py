"""The page: tabs over a `JobService`. Only this folder knows Gradio."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from gradio.route_utils import FnIndexInferError

from app.api.service import JobService
from app.ui import gradio_api
from app.ui.html.templates import render
from app.ui.page import STATIC, TICK, Page, read_static
from app.ui.tabs import caches, compress, generate, history, settings, training

logger = logging.getLogger(__name__)

ICON = """<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
%3E%3Crect width='16' height='16' rx='4' fill='%230f766e'/%3E%3Cpath d='M6 4.5v7l6-3.5z' fill='white'/%3E%3C/svg%3E">"""

HEADER = """<header class="lv-head"><h1>Long Video Diffusion</h1>
<p>Describe a video and watch it grow, group by group, while it is generated.</p></header>"""

# System fonts: nothing to fetch.
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

MALFORMED = (FnIndexInferError, KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError, OSError,
            UnicodeError, RecursionError, NotImplementedError, httpx.InvalidURL, httpx.HTTPError)  # fmt: skip

TABS = (("Generate", generate), ("History", history), ("Compress", compress), ("Caches", caches),
        ("Training", training), ("Settings", settings))  # fmt: skip


def build(service: JobService) -> gr.Blocks:
    """Build the page, with its events and the named API endpoints."""
    with gr.Blocks(title="Long Video Diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(HEADER, padding=False)
        page = Page(service, blocks)
        with gr.Tabs(elem_id="tabs") as page.tabs:
            for name, module in TABS:
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    module.build(page)
        gradio_api.build(page)
        page.poll_on(gr.Timer(TICK))
    return blocks.queue(max_size=200, default_concurrency_limit=None)


def mount(app: FastAPI, service: JobService) -> None:
    """Put the page at /. Only the folder of the jobs, with its generated names, is readable over Gradio's API."""
    gr.set_static_paths([service.job_files.jobs])
    options: dict[str, Any] = {
        "theme": _theme(),
        "css": "\n".join(path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("*.css"))),
        "head": f"{ICON}<script>{read_static('page.js')}</script>",
    }
    app.get("/docs", include_in_schema=False)(lambda: HTMLResponse(render("api.html", "page", app.openapi())))
    blocks = build(service)
    # Mounted Blocks that are not launched accept any path from a client and copy the file into their cache (seen with
    # Gradio 6.31, `processing_utils._check_allowed`): so they are marked as launched.
    blocks.has_launched = blocks.is_running = True
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=service.config.max_upload,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=service.config.mcp,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None,
                    "exception_handlers": dict.fromkeys(MALFORMED, _malformed)},
        **options,
    )


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """Answer a malformed request to Gradio's own endpoints with 400: they raise errors that would be a 500. Errors of
    our functions do not come here: Gradio sends them in the event."""
    logger.warning("malformed request to %s: %r", request.url.path[:200], error)
    return JSONResponse({"error": "This request cannot be understood."}, 400)


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="zinc", radius_size="md", font=FONT, font_mono=MONO)
    return theme.set(  # darker than the default, so that the white label is readable
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
