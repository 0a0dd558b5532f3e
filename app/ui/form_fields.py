"""The components of the Generate tab's form, and the controls that fill it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import gradio as gr

from app.config import AppConfig
from app.tasks.generate import GenerateParams
from app.tasks.pipeline_spec import PipelineSpec
from app.ui.form_values import DEFAULT_SIZE, FILE, HISTORY, TEXT, schedulers, sizes
from app.ui.html.buttons import TILES
from app.ui.html.templates import render
from app.ui.page import read_static

FROM_SETTINGS = ("from Settings", "")  # the choice of the pipeline
EXAMPLES = {  # prompts that the shipped weights know
    "red circle, stripes": "a red circle moving left over a striped background",
    "blue square, checkers": "a blue square moving up over a checkered background",
    "yellow triangle, clouds": "a yellow triangle moving right over a cloudy background",
    "magenta cross": "a magenta cross moving down-left over a plain background",
}


def make_fields(initial: dict[str, Any], spec: PipelineSpec,
                config: AppConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Create the fields, by the names in `form_values.NAMES`, and the controls. `initial`: values of the fields."""
    f: dict[str, Any] = {}
    controls: dict[str, Any] = {}
    example = next(iter(EXAMPLES.values()))
    f["prompt"] = gr.Textbox(label="Prompt", lines=4, max_lines=10, placeholder=f"e.g. {example}", elem_id="prompt")
    controls["examples"] = gr.HTML(render("form.html", "examples", EXAMPLES), js_on_load=read_static("actions.js"),
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
        f["pipeline"] = gr.Dropdown([FROM_SETTINGS], value="", label="Pipeline", allow_custom_value=True,
                                    elem_id="pipeline")
        controls["limits"] = gr.HTML("", elem_id="limits")
    f["loras"] = gr.HTML([], html_template=read_static("loras.html"), js_on_load=read_static("loras.js"),
                         elem_id="loras", apply_default_css=False, choices=[], hint="")
    with gr.Group() as controls["source"]:
        f["start_from"] = gr.Radio([TEXT, FILE, HISTORY], value=TEXT, label="Start from", elem_id="start-from")
        # An id, validated like all others. Not a gr.State: that has no change event and is lost at a restart.
        f["upload"] = gr.Textbox("", label="upload", visible="hidden", elem_id="start-upload")
        with gr.Column(visible=False, elem_id="upload-panel") as controls["upload_panel"]:
            controls["file"] = gr.File(label="Image or video", file_types=["image", "video"], height=120,
                                elem_id="start-file")
            controls["upload_info"] = gr.HTML("", elem_id="upload-info")
        with gr.Row(visible=False, elem_id="extend-panel") as controls["extend_panel"]:
            f["job"] = gr.Dropdown([], value="", label="Extend", allow_custom_value=True,
                                   elem_id="start-job", scale=3)
            controls["latest"] = gr.Button("Latest", size="sm", elem_id="start-latest", scale=1, min_width=100)
    with gr.Group():
        f["seconds"] = gr.Slider(0.1, config.max_seconds, initial["seconds"], step=0.1, label="Seconds",
                                 elem_id="seconds")
        f["size"] = gr.Dropdown(sizes(spec, config.max_side), value=DEFAULT_SIZE, label="Size", elem_id="size")
        with gr.Row(visible=False, elem_id="sides") as controls["sides"]:
            for name in "width", "height":
                f[name] = gr.Number(
                    initial[name],
                    label=f"{name.capitalize()} in pixels",
                    precision=0,
                    step=spec.size_multiple,
                    minimum=spec.size_multiple,
                    elem_id=name,
                    min_width=100,
                )
    with gr.Group(), gr.Row():
        f["num_inference_steps"] = gr.Slider(*limits("num_inference_steps"), initial["num_inference_steps"],
                                             step=1, label="Steps", elem_id="steps", min_width=140)
        f["guidance_scale"] = gr.Slider(*limits("guidance_scale"), initial["guidance_scale"], step=0.25,
                                        label="Guidance", elem_id="guidance", min_width=140)
    with gr.Row(elem_id="seed-row", equal_height=False):
        f["seed"] = gr.Textbox(label="Seed", placeholder="random; recorded in the video", max_lines=1, elem_id="seed",
                               scale=3, min_width=110)  # a gr.Number would show 0 if empty
        controls["random"] = gr.Button("Random", size="sm", elem_id="seed-random", scale=1, min_width=72)
        controls["reuse"] = gr.Button("Reuse last", size="sm", elem_id="seed-last", scale=1, min_width=72)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        with gr.Row():
            f["frame_rate"] = gr.Textbox(label="Frame rate", placeholder=f"{spec.frame_rate:g}, the model's",
                                         max_lines=1, elem_id="frame-rate", min_width=140)
            f["scheduler"] = gr.Dropdown(schedulers(spec), value="", label="Scheduler", elem_id="scheduler",
                                         scale=2, min_width=140)
        tiles: list[Any] = [("automatic", ""), *((f"{tile} pixels", tile) for tile in TILES)]
        f["tile"] = gr.Dropdown(tiles, value="", label="Decoding tiles", elem_id="tile")
        rest = [name for name in GenerateParams.model_fields if name in initial and name not in f]
        f |= {name: _number_field(name, initial[name]) for name in rest}
    return f, controls


def limits(name: str) -> tuple[float, float]:
    """Return the range of a parameter for a slider; infinity where it has no bound."""
    metadata = GenerateParams.model_fields[name].metadata
    bounds = {key: bound for constraint in metadata for key, bound in asdict(constraint).items()}
    return bounds.get("ge", bounds.get("gt", -math.inf)), bounds.get("le", bounds.get("lt", math.inf) - 0.01)


def _number_field(name: str, value: Any) -> Any:
    """Create a slider for a parameter with a default, or a text box that may stay empty for one without."""
    field, (low, high), label = GenerateParams.model_fields[name], limits(name), name.replace("_", " ").capitalize()
    elem_id = name.replace("_", "-")
    if field.default is None:
        return gr.Textbox(label=label, info=field.description, max_lines=1, elem_id=elem_id)
    step = 1 if field.annotation is int else 0.01
    return gr.Slider(low, high, value, step=step, label=label, info=field.description, elem_id=elem_id)
