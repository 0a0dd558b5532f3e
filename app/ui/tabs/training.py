"""The Training tab: trainings are started, watched, stopped and resumed."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.storage.jobs import Job, JobKind, JobState
from app.tasks.train import TrainParams, default_params
from app.tasks.training_defaults import DEPENDENT
from app.ui.html.job_list import choices, job_list_panel, metric_grid, picture, submit
from app.ui.html.templates import render
from app.ui.page import SILENT_EVENT, Page, error_html
from lvdm.model.presets import PRESETS
from odvae.utils.errors import UserError

MODELS = [("video generator (LVDM), on latent caches", "lvdm"), ("VAE (OD-VAE), on videos", "odvae")]
CONDITIONS = [("text: the captions", "text"), ("class: captions are classes", "class"), ("unconditional", "none")]
INITIAL_WEIGHTS = {"lvdm": [("new weights", ""), ("the shipped LVDM", "shipped")],
                   "odvae": [("new weights", ""), ("natural (shipped)", "shipped")]}  # fmt: skip
EMPTY = "No trainings yet. Pick the data, give the training a name, and start it."
FIELDS = ("model", "name", "caches", "videos", "init_from", "preset", "steps", "micro_batch_size", "learning_rate",
          "frames", "held_out", "height", "width", "frame_rate", "condition", "lora", "freeze_encoder", "optimizer",
          "warmup", "gradient_accumulation_steps", "evaluate_every", "save_every", "samples", "mixed_precision", "seed",
          "vae", "gradient_checkpointing", "compile")  # fmt: skip
CURVE_LABELS = {"loss_heldout": "held-out loss", "perceptual": "perceptual distance"}
MODEL_FIELDS = {"lvdm": ("caches", "preset", "condition", "lora", "samples", "vae"),
        "odvae": ("videos", "height", "width", "frame_rate", "freeze_encoder")}  # fmt: skip


def build(page: Page) -> None:
    """Add the tab's components and events."""
    default = TrainParams()
    fields: dict[str, Any] = {}

    def number(key: str, label: str, **options: Any) -> None:
        whole = isinstance(getattr(default, key), int)
        fields[key] = gr.Number(getattr(default, key), label=label, precision=0 if whole else None, min_width=110,
                              elem_id=f"train-{key}", **options)

    with gr.Row(equal_height=False, elem_classes="lw-tab"):
        with gr.Column(scale=4, min_width=320):
            fields["model"] = gr.Radio(MODELS, label="Model", value="lvdm", elem_id="train-model")
            fields["caches"] = gr.Dropdown(choices(page, "cache"), label="Latent caches", value=[], multiselect=True,
                                         elem_id="train-caches", info="one or several, of the same VAE")
            fields["videos"] = gr.Dropdown(choices(page, "videos"), label="Videos", value=None, visible=False,
                                         elem_id="train-videos")
            fields["name"] = gr.Textbox(label="Name", max_lines=1, elem_id="train-name",
                                      placeholder="letters, digits, dots, - and _")
            with gr.Row():
                fields["init_from"] = gr.Dropdown(_weights(page, "lvdm"), label="Initialize from", value="",
                                           elem_id="train-init_from", min_width=160)
                fields["preset"] = gr.Dropdown(list(PRESETS), label="Preset", value=default.preset, min_width=110,
                                             elem_id="train-preset")
            with gr.Row():
                number("steps", "Steps")
                number("micro_batch_size", "Micro batch size")
                number("learning_rate", "Learning rate")
            with gr.Accordion("More", open=False, elem_id="train-more"):
                with gr.Row():
                    number("frames", "Frames per window", info="1 + 4k")
                    number("held_out", "Held-out clips", info="for evaluation")
                with gr.Row(visible=False) as pixels:
                    number("height", "Height")
                    number("width", "Width")
                    number("frame_rate", "Frame rate")
                with gr.Row():
                    fields["condition"] = gr.Dropdown(CONDITIONS, label="Conditioning", value="text",
                                                    elem_id="train-condition", min_width=160)
                    number("lora", "LoRA rank (0: none)")
                fields["freeze_encoder"] = gr.Checkbox(False, label="Freeze the encoder: caches stay valid",
                                                     visible=False, elem_id="train-freeze_encoder")
                with gr.Row():
                    fields["optimizer"] = gr.Dropdown(["muon", "adamw"], label="Optimizer", value=default.optimizer,
                                                    elem_id="train-optimizer", min_width=110)
                    number("warmup", "Warm-up steps")
                    number("gradient_accumulation_steps", "Gradient accumulation")
                with gr.Row():
                    number("evaluate_every", "Evaluate every", info="steps")
                    number("save_every", "Save every", info="steps")
                    number("samples", "Samples", info="videos per evaluation")
                with gr.Row():
                    fields["mixed_precision"] = gr.Dropdown([("automatic", "auto"), ("float32", "no"),
                                                             ("bfloat16", "bf16")],
                                                            label="Precision",
                                                    value="auto", elem_id="train-precision", min_width=110)
                    number("seed", "Seed")
                fields["vae"] = gr.Dropdown(choices(page, "vae", [("the caches' VAE", "")]), label="OD-VAE",
                                          value="", elem_id="train-vae")
                fields["gradient_checkpointing"] = gr.Dropdown(
                    ["auto", "none", "attention", "full"], value="auto", elem_id="train-gradient_checkpointing",
                    label="Gradient checkpointing: the more, the slower and the less memory")
                fields["compile"] = gr.Checkbox(False, label="Compile the model: takes minutes, then faster",
                                              elem_id="train-compile")
            start = gr.Button("Start training", variant="primary", elem_id="train-start")
            with gr.Group():
                run = gr.Dropdown(choices(page, "run"), label="Existing training", value=None,
                                  elem_id="train-run")
                with gr.Row(equal_height=False):
                    to_step = gr.Number(0, label="Total steps", precision=0, min_width=110,
                                        elem_id="train-resume-steps", info="0: as configured; the schedule follows")
                    resume = gr.Button("Resume", elem_id="train-resume", min_width=120)
                    refresh = gr.Button("Refresh lists", elem_id="train-refresh", min_width=120)
        with gr.Column(scale=5, min_width=320):
            selected, event, notice = job_list_panel(page, JobKind.TRAIN, "train", detail, EMPTY, curves)

    def on_start(request: gr.Request, *form: Any) -> tuple[Any, str]:
        return submit(page, JobKind.TRAIN, to_params(dict(zip(FIELDS, form, strict=True))), request)

    def on_resume(request: gr.Request, run: str | None, steps: float | None) -> tuple[Any, str]:
        if not run:
            return gr.skip(), error_html(UserError("Pick a training first."))
        return submit(page, JobKind.TRAIN, {"run": run} | ({"steps": steps} if steps else {}), request)

    def list_choices(model: str) -> tuple[Any, ...]:
        return (gr.Dropdown(choices=choices(page, "cache")), gr.Dropdown(choices=choices(page, "videos")),
                gr.Dropdown(choices=_weights(page, model)), gr.Dropdown(choices=choices(page, "run")),
                gr.Dropdown(choices=choices(page, "vae", [("the caches' VAE", "")])))

    def refresh_lists(model: str) -> tuple[Any, ...]:
        page.service.services.assets.invalidate()
        return list_choices(model)

    model_fields = {key: fields[key] for key in (*MODEL_FIELDS["lvdm"], "videos", "freeze_encoder")}

    def show_fields(model: str) -> tuple[Any, ...]:
        """Show only the fields of this model."""
        return (*(gr.update(visible=key in MODEL_FIELDS[model]) for key in model_fields),
                gr.Row(visible=model == "odvae"), gr.Dropdown(choices=_weights(page, model), value=""))

    def follow(model: str, init_from: str | None, lora: float | None, before: dict[str, Any],
               *values: Any) -> tuple[Any, ...]:
        """Set the fields that follow from what is trained, but for those that the user has changed."""
        now = default_params(model, init_from or "", int(lora or 0), page.service.services)
        after = {key: getattr(now, key) for key in following}
        return (after, *(after[key] if value == before[key] else gr.skip()
                         for key, value in zip(following, values, strict=True)))

    following = {key: fields[key] for key in DEPENDENT if key in fields}
    followed = gr.State({key: getattr(default, key) for key in following})
    for key in ("model", "init_from", "lora"):
        fields[key].change(follow, [fields["model"], fields["init_from"], fields["lora"], followed,
                                    *following.values()], [followed, *following.values()], **SILENT_EVENT)
    choice_fields = [fields["caches"], fields["videos"], fields["init_from"], run, fields["vae"]]
    start.click(on_start, [fields[key] for key in FIELDS], [selected, notice], **SILENT_EVENT).success(**event)
    resume.click(on_resume, [run, to_step], [selected, notice], **SILENT_EVENT).success(**event)
    refresh.click(refresh_lists, [fields["model"]], choice_fields, **SILENT_EVENT)
    page.blocks.load(list_choices, [fields["model"]], choice_fields, **SILENT_EVENT)
    fields["model"].change(show_fields, [fields["model"]], [*model_fields.values(), pixels, fields["init_from"]],
                           **SILENT_EVENT)


def _weights(page: Page, model: str) -> list[tuple[str, str]]:
    return choices(page, "pipeline" if model == "lvdm" else "vae", INITIAL_WEIGHTS[model])


def to_params(form: dict[str, Any]) -> dict[str, Any]:
    """Return the form's values as params, without empty fields and those of the other model."""
    other = MODEL_FIELDS["odvae" if form["model"] == "lvdm" else "lvdm"]
    raw = {key: value for key, value in form.items() if key not in other and value is not None}
    return raw | {"name": (form["name"] or "").strip()}


def curves(job: Job) -> dict[str, Any]:
    """Return the loss curves of a training by their labels."""
    return {CURVE_LABELS.get(name, name): points for name, points in (job.result.get("series") or {}).items()}


def detail(job: Job) -> str:
    """Return metrics and samples of a training as HTML."""
    result, progress = job.result, job.progress
    losses = result.get("losses") or {}
    metrics: dict[str, str] = {}
    if result.get("steps"):
        training = progress.phase == "train" and job.state is JobState.RUNNING
        step = max(result.get("step", 0), int(progress.done) if training else 0)
        metrics["step"] = f"{step:,} of {result['steps']:,}"
    names = {"loss": "loss", "loss_heldout": "held-out loss", "psnr_heldout": "held-out PSNR", "lr": "learning rate",
             "grad_norm": "gradient norm"}  # fmt: skip
    for key, name in names.items():
        if key in losses:
            metrics[name] = f"{losses[key]:.4g}{' dB' if 'PSNR' in name else ''}"
    for key, unit in ("samples_per_second", "samples/s"), ("tokens_per_second", "tokens/s"):
        if result.get(key):
            metrics[unit] = f"{result[key]:,.3g}" if result[key] < 1000 else f"{result[key]:,.0f}"
    if result.get("mfu"):
        metrics["MFU"] = f"{result['mfu']:.1%}"
    if result.get("data_wait"):
        metrics["data wait"] = f"{result['data_wait']:.0%}"
    if result.get("skipped"):
        metrics["log lines with skipped steps"] = str(result["skipped"])
    use = "for generation" if job.params.get("model") == "lvdm" else "as an OD-VAE"
    parts = [render("job_list.html", "export", result["asset_name"], use)] if result.get("asset_name") else []
    parts.append(metric_grid(metrics))
    if "sample_step" in result:
        parts.append(picture(job, "sheet.webp", f"Samples at step {result['sample_step']:,}"))
    return "".join(parts)
