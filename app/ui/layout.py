"""The page: prompt and settings left, player and progress right, the history below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from app.params import MAX_GUIDANCE, MAX_STEPS
from app.ui import render
from app.ui.handlers import Handlers
from app.worker import Worker
from lvdm.defaults import GUIDANCE_SCALE, STEPS

HERE = Path(__file__).parent
TICK = 0.7  # seconds between two looks at the store; a look takes milliseconds and sends only what has changed

EXAMPLES = [
    "a red circle moving left over a striped background",
    "a blue square moving up over a checkered background",
    "a yellow triangle moving right over a cloudy background",
    "a magenta cross moving down-left over a plain background",
]

HEADER = """<header class="lv-head"><h1>Long Video Diffusion</h1>
<p>Describe a video and watch it grow, group after group, while it is being made.</p></header>"""

PLAYER = """<div class="lv-player" data-state="empty" data-live="false">
<div class="lv-screen"><video class="lv-on" muted autoplay playsinline controls></video>
<video muted playsinline controls></video>
<div class="lv-hint"></div><span class="lv-live">growing</span></div></div>"""

ICON = """<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
%3E%3Crect width='16' height='16' rx='4' fill='%230f766e'/%3E%3Cpath d='M6 4.5v7l6-3.5z' fill='white'/%3E%3C/svg%3E">"""

# Fonts of the machine: nothing to fetch.
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def build(worker: Worker) -> gr.Blocks:
    """The Blocks of the page, with its events and the named API endpoints."""
    does = Handlers(worker)
    with gr.Blocks(title="Long Video Diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        # Key and secret are fixed, so that a page re-attaches after a restart; what they hide is no secret.
        followed = gr.BrowserState(None, storage_key="lvdm-followed", secret="lvdm-app")
        seen = gr.State({})
        gr.HTML(HEADER, padding=False)
        with gr.Row(elem_classes="lv-main", equal_height=False):
            with gr.Column(scale=4, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder=EXAMPLES[0], elem_id="prompt")
                gr.Examples([[text] for text in EXAMPLES], [prompt], label="Try one of these", elem_id="examples")
                with gr.Group():
                    length = min(4.0, worker.max_seconds)
                    seconds = gr.Slider(0.1, worker.max_seconds, length, step=0.1, label="Seconds", elem_id="seconds")
                    hint = gr.HTML(does.hint(length), elem_id="hint")
                with gr.Group(), gr.Row():
                    steps = gr.Slider(1, MAX_STEPS, STEPS, step=1, label="Steps", elem_id="steps", min_width=120)
                    guidance = gr.Slider(
                        0, MAX_GUIDANCE, GUIDANCE_SCALE, step=0.25, label="Guidance", elem_id="guidance", min_width=120
                    )
                negative = gr.Textbox(
                    label="Negative prompt", value="", placeholder="what the video is led away from", elem_id="negative"
                )
                seed = gr.Textbox(  # a gr.Number would show an empty one as 0
                    label="Seed", value="", placeholder="random; the video says which", max_lines=1, elem_id="seed"
                )
                generate = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                notice = gr.HTML("", elem_id="notice")
            with gr.Column(scale=5, min_width=320):
                player = gr.HTML(
                    render.player(None), html_template=PLAYER, js_on_load=_text("player.js"), elem_id="player"
                )
                status = gr.HTML(render.status(None), js_on_load=_text("actions.js"), elem_id="status")
        gr.HTML('<h2 class="lv-title">History</h2>')
        history = gr.HTML(render.history([], None), js_on_load=_text("actions.js"), elem_id="history")
        timer = gr.Timer(TICK)

        form = [prompt, negative, seed, seconds, steps, guidance]
        view = [player, status, history, seen]
        look: dict[str, Any] = {"fn": does.look, "inputs": [followed, seen], "outputs": view, **QUIET}
        page.load(**look)
        page.load(does.hint, [seconds], [hint], **QUIET)
        timer.tick(**look)
        seconds.change(does.hint, [seconds], [hint], **QUIET)
        for press in (generate.click, prompt.submit):
            press(does.generate, form, [followed, notice], **QUIET).success(**look)
        for panel in (status, history):
            panel.click(does.act, [followed], [followed, notice, *form], **QUIET).success(**look)

        for function in (does.submit, does.status, does.cancel, does.result):
            gr.api(function, api_name=function.__name__, concurrency_limit=None)
    return page.queue(max_size=200, default_concurrency_limit=None)


# Events of the page itself: not in the API, no veil over what they change, and no place in the queue.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def mount(app: FastAPI, worker: Worker) -> None:
    """Put the page at /. Only the folder of the videos, with its generated names, is readable over the API."""
    gr.set_static_paths([worker.library.videos])
    gr.mount_gradio_app(
        app,
        build(worker),
        path="/",
        theme=_theme(),
        css=_text("style.css"),
        head=ICON,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="1mb",  # nothing is uploaded here
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="zinc", radius_size="md", font=FONT, font_mono=MONO)
    return theme.set(  # darker than the theme's own, so that the white label can be read
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
