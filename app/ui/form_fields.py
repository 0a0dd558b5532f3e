"""The components of the Generate tab's form, and those that help to fill it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import gradio as gr

from app.config import AppConfig
from app.tasks.generate import GenerateParams
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
        # An id, checked like all others. No gr.State: it reports no change, and a restart forgets it.
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
        f["steps"] = gr.Slider(*limits("steps"), first["steps"], step=1, label="Steps", elem_id="steps", min_width=140)
        f["guidance_scale"] = gr.Slider(*limits("guidance_scale"), first["guidance_scale"], step=0.25, label="Guidance",
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
        tiles: list[Any] = [("automatic", ""), *((f"{tile} pixels", tile) for tile in TILES)]
        f["tile"] = gr.Dropdown(tiles, value="", label="Decoding tiles", elem_id="tile")
        rest = [name for name in GenerateParams.model_fields if name in first and name not in f]
        f |= {name: _number(name, first[name]) for name in rest}
    return f, o


def limits(name: str) -> tuple[float, float]:
    """The range of a parameter as a slider needs it; infinity where it has no bound."""
    known = {key: bound for one in GenerateParams.model_fields[name].metadata for key, bound in asdict(one).items()}
    return known.get("ge", known.get("gt", -math.inf)), known.get("le", known.get("lt", math.inf) - 0.01)


def _number(name: str, value: Any) -> Any:
    """A slider for a parameter with a default; for one without, a text box that may stay empty."""
    field, (low, high), label = GenerateParams.model_fields[name], limits(name), name.replace("_", " ").capitalize()
    elem_id = name.replace("_", "-")
    if field.default is None:
        return gr.Textbox(label=label, info=field.description, max_lines=1, elem_id=elem_id)
    step = 1 if field.annotation is int else 0.01
    return gr.Slider(low, high, value, step=step, label=label, info=field.description, elem_id=elem_id)
