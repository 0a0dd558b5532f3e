"""The components of the Generate tab's form, and those that help to fill it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.config import AppConfig
from app.tasks.generate import MAX_GUIDANCE, MAX_STEPS
from app.tasks.pipeline_spec import PipelineSpec
from app.ui.form_values import FILE, HISTORY, OWN, TEXT, sizes
from app.ui.html.buttons import TILES
from app.ui.html.templates import render
from app.ui.page import read_static
from lvdm.defaults import SCHEDULERS

AS_SET = ("from Settings", "")  # which pipeline makes a video
EXAMPLES = {  # what the weights that ship know
    "red circle, stripes": "a red circle moving left over a striped background",
    "blue square, checkers": "a blue square moving up over a checkered background",
    "yellow triangle, clouds": "a yellow triangle moving right over a cloudy background",
    "magenta cross": "a magenta cross moving down-left over a plain background",
}


def make_fields(first: dict[str, Any], card: PipelineSpec, config: AppConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the fields, by the names in `form_values.NAMES`, and the others. `first`: the initial values."""
    f: dict[str, Any] = {}
    o: dict[str, Any] = {}
    example = next(iter(EXAMPLES.values()))
    f["prompt"] = gr.Textbox(label="Prompt", lines=4, max_lines=10, placeholder=f"e.g. {example}", elem_id="prompt")
    o["examples"] = gr.HTML(render("form.html", "examples", EXAMPLES), js_on_load=read_static("actions.js"),
                            elem_id="examples")
    f["sections"] = gr.HTML(
        [],
        html_template=read_static("timeline.html"),
        js_on_load=read_static("timeline.js"),
        elem_id="timeline",
        apply_default_css=False,
    )
    f["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="what to avoid",
                                      max_lines=4, elem_id="negative")
    with gr.Group():
        f["begin"] = gr.Radio([TEXT, FILE, HISTORY], value=TEXT, label="Start from", elem_id="begin")
        # An id, checked like all others. No gr.State: of that no change is told, and a restart forgets it.
        f["upload"] = gr.Textbox("", label="upload", visible="hidden", elem_id="begin-upload")
        with gr.Column(visible=False, elem_id="bring") as o["bring"]:
            o["file"] = gr.File(label="A picture or a video", file_types=["image", "video"], height=120,
                                elem_id="begin-file")
            o["brought"] = gr.HTML("", elem_id="brought")
        with gr.Row(visible=False, elem_id="go-on") as o["go_on"]:
            f["job"] = gr.Dropdown([], value="", label="Extend", allow_custom_value=True,
                                   elem_id="begin-job", scale=3)
            o["last"] = gr.Button("Latest", size="sm", elem_id="begin-last", scale=1, min_width=100)
    with gr.Group():
        f["seconds"] = gr.Slider(0.1, config.max_seconds, first["seconds"], step=0.1, label="Seconds",
                                 elem_id="seconds")
        f["size"] = gr.Dropdown(sizes(card, config.max_side), value=OWN, label="Size", elem_id="size")
        with gr.Row(visible=False, elem_id="sides") as o["sides"]:
            for name in "width", "height":
                f[name] = gr.Number(
                    first[name],
                    label=f"{name.capitalize()} in pixels",
                    precision=0,
                    step=card.size_multiple,
                    minimum=card.size_multiple,
                    elem_id=name,
                    min_width=100,
                )
    with gr.Group(), gr.Row():
        f["steps"] = gr.Slider(1, MAX_STEPS, first["steps"], step=1, label="Steps", elem_id="steps", min_width=140)
        f["guidance_scale"] = gr.Slider(0, MAX_GUIDANCE, first["guidance_scale"], step=0.25, label="Guidance",
                                        elem_id="guidance", min_width=140)
    with gr.Row(elem_id="seeding", equal_height=False):
        f["seed"] = gr.Textbox(label="Seed", placeholder="random; recorded in the video", max_lines=1, elem_id="seed",
                               scale=3, min_width=110)  # a gr.Number would show an empty one as 0
        o["random"] = gr.Button("Random", size="sm", elem_id="seed-random", scale=1, min_width=72)
        o["reuse"] = gr.Button("Reuse last", size="sm", elem_id="seed-last", scale=1, min_width=72)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        f["pipeline"] = gr.Dropdown([AS_SET], value="", label="Checkpoint", allow_custom_value=True,
                                    elem_id="checkpoint")
        with gr.Row():
            f["frame_rate"] = gr.Textbox(label="Frame rate", placeholder=f"{card.frame_rate:g}, the model's",
                                         max_lines=1, elem_id="frame-rate", min_width=140)
            f["scheduler"] = gr.Dropdown([("the model's", ""), *SCHEDULERS], value="", label="Scheduler",
                                         elem_id="scheduler", min_width=140)
        f["guidance_rescale"] = gr.Slider(0, 1, first["guidance_rescale"], step=0.05, label="Guidance rescale",
                                          info="share of the added contrast that is removed",
                                          elem_id="rescale")
        f["window"] = gr.Slider(1, 64, first["window"], step=1, label="Context window", elem_id="window",
                                info="previous groups attended to, besides the first frame")
        f["history_noise"] = gr.Slider(0, 0.95, first["history_noise"], step=0.01, label="History noise",
                                       info="added to the previous groups", elem_id="history-noise")
        f["shift"] = gr.Textbox(label="Timestep shift", placeholder="by resolution", max_lines=1, elem_id="shift")
        tiles: list[Any] = [("automatic", ""), *((f"{tile} pixels", tile) for tile in TILES)]
        f["tile"] = gr.Dropdown(tiles, value="", label="Decoding tiles", elem_id="tile")
    return f, o
