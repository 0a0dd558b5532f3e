"""Train an LVDM on caches or an OD-VAE on videos: start, monitor, stop and resume runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from app.storage.asset_scanner import run_model
from app.storage.jobs import JobKind, JobSignal
from app.tasks.cache import ID, check_name, checked, convert_to_webp, find_cache_vae
from app.tasks.context import JobContext, JobInterrupted, Services
from app.tasks.run_command import run_command
from app.tasks.training_defaults import dependent_defaults
from app.tasks.training_log import read_lines, series_of
from lvdm.capabilities import pipeline_kind
from lvdm.model.presets import PRESETS
from lvdm.weights import DEMO_TRANSFORMER
from odvae.utils.config import Config
from odvae.utils.errors import UserError
from odvae.utils.files import write_text
from odvae.weights import NATURAL_VAE

TRAINABLE = ("LVDMPipeline", "OpenSoraPipeline")  # pipelines that a training may start from
POLL_SECONDS = 2.0  # seconds between two reads of the log
LOSSES = {"lvdm": ("loss", "loss_heldout"), "odvae": ("loss", "l1", "l2", "perceptual")}
# What may change when a run is resumed, and its key in the config.
RESUMABLE = {"steps": "loop.steps", "micro_batch_size": "loop.micro_batch_size",
             "gradient_accumulation_steps": "loop.gradient_accumulation_steps", "compile": "loop.compile",
             "gradient_checkpointing": "loop.gradient_checkpointing", "evaluate_every": "loop.evaluate_every",
             "save_every": "loop.save_every", "log_every": "loop.log_every", "samples": "sample.count",
             "sample_steps": "sample.steps"}  # fmt: skip
SPEED_METRICS = ("frames_per_second", "tokens_per_second", "mfu", "data_wait")  # of speed.jsonl


class TrainParams(Config):
    """The parameters of a training. Whether they fit the data, the command itself checks."""

    model: Literal["lvdm", "odvae"] = "lvdm"
    name: str = Field("", max_length=60)  # of a new run; or
    run: str = ID  # an existing run to resume, with changes of `RESUMABLE` only
    caches: tuple[str, ...] = Field((), max_length=8)  # of an LVDM: assets
    videos: str = ID  # of an OD-VAE: an asset
    vae: str = ID  # of an LVDM; "": the VAE of the caches
    init_from: str = ID  # "": new weights; "shipped"; or an asset: a pipeline, for an OD-VAE a VAE
    preset: str = Field("5m", max_length=10)  # of new weights of an LVDM
    lora: int = Field(0, ge=0, le=256)  # rank of the adapters on `init_from`; 0: train all weights
    condition: Literal["text", "class", "none"] = "text"
    frames: int = Field(17, ge=1, le=1025)  # 1 + 4k
    height: int = Field(64, ge=8, le=1024)  # of the windows of an OD-VAE, pixels
    width: int = Field(64, ge=8, le=1024)
    frame_rate: float = Field(8.0, ge=0.1, le=120)
    freeze_encoder: bool = False
    steps: int = Field(1000, ge=1, le=10_000_000)
    micro_batch_size: int = Field(8, ge=1, le=4096)
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024)
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = Field(2e-3, gt=0, le=1)
    warmup: int = Field(100, ge=0, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**31)
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    compile: bool = False
    gradient_checkpointing: Literal["auto", "none", "attention", "full"] = "auto"
    held_out: int = Field(16, ge=0, le=10_000)
    evaluate_every: int = Field(500, ge=1, le=10_000_000)
    save_every: int = Field(500, ge=1, le=10_000_000)
    log_every: int = Field(10, ge=1, le=1_000_000)
    samples: int = Field(4, ge=0, le=32)  # videos that an LVDM generates at each evaluation
    sample_steps: int = Field(20, ge=1, le=200)

    @field_validator("caches")
    @classmethod
    def _check_caches(cls, caches: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(cache) > 32 for cache in caches):
            raise ValueError("each must be one from the list")
        return caches

    @field_validator("frames")
    @classmethod
    def _check_frames(cls, frames: int) -> int:
        if frames % 4 != 1:
            below = (frames - 1) // 4 * 4 + 1
            raise ValueError(f"a window has 1 + 4k frames, such as {below} or {below + 4}")
        return frames

    @field_validator("height", "width")
    @classmethod
    def _check_side(cls, side: int) -> int:
        if side % 8:
            raise ValueError(f"must be a multiple of 8, such as {side // 8 * 8} or {side // 8 * 8 + 8}")
        return side

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"must be one of {', '.join(PRESETS)}")
        return preset


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """Validate the parameters and fill in the defaults. Raises UserError."""
    params = checked(TrainParams(), raw, "training")
    if params.run:
        return _validate_resume(params, raw.keys() - {"run", "name", "model"}, services)
    params = checked(default_params(params.model, params.init_from, params.lora, services), raw, "training")
    if not params.name:
        raise UserError("Give the new training a name, or pick one to resume.")
    lvdm = params.model == "lvdm"
    if lvdm and not params.caches:
        raise UserError("Pick a latent cache to train on; build one from your videos first.")
    if not lvdm and not params.videos:
        raise UserError("Pick a folder of videos to train on.")
    for cache in params.caches if lvdm else ():
        services.assets.find(cache, "cache")
    if not lvdm:
        services.assets.find(params.videos, "videos")
    if params.init_from not in ("", "shipped"):
        services.assets.find(params.init_from, "pipeline" if lvdm else "vae")
    if lvdm and params.vae:
        services.assets.find(params.vae, "vae")
    if params.lora and not (lvdm and params.init_from):
        raise UserError("LoRA needs trained weights of an LVDM: pick those to initialize from.")
    raw_params = params.model_dump(mode="json")
    check_name("run", JobKind.TRAIN, raw_params, services)
    return raw_params, f"Train {params.name}"


def default_params(model: str, init_from: str, lora: int, services: Services) -> TrainParams:
    """Return the defaults of a new training, which follow from what is trained."""
    return TrainParams().model_copy(update=dependent_defaults(model, init_from, lora, services))


def _validate_resume(params: TrainParams, changed: Set[str], services: Services) -> tuple[dict[str, Any], str]:
    """Validate the parameters of a resumed run, of which `changed` were given."""
    if params.name:
        raise UserError("Give a name for a new training, or pick one to resume, not both.")
    asset = services.assets.get(params.run, "run")
    _check_output(asset.path)
    model = run_model(asset.path) or "lvdm"
    fixed = changed - RESUMABLE.keys() | (changed & {"samples", "sample_steps"} if model == "odvae" else set())
    if fixed:
        raise UserError(f"{', '.join(sorted(fixed))}: cannot change when a training is resumed. Omit it, or start a "
                        f"new training.")
    changes = {name: getattr(params, name) for name in sorted(changed)}
    return {"run": params.run, "model": model, **changes}, f"Resume {asset.name}"


def _check_output(run: Path) -> None:
    """Raise UserError if the config of a run names another folder: the command would resume there."""
    try:
        output = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["output"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{run.name} cannot be resumed: its config.yaml is damaged.") from error
    if Path(output).absolute() != run:
        raise UserError(f"{run.name} cannot be resumed: it was started in {output}. Move it back there, or start a new "
                        f"training from its weights.")


def make_config(params: TrainParams, services: Services, output: Path) -> dict[str, Any]:
    """Return the config of `lvdm train` or `odvae train`. May load VAEs to find the one of a cache."""
    find = services.assets.find
    loop = {
        "steps": params.steps,
        "micro_batch_size": params.micro_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        "seed": params.seed,
        "mixed_precision": params.mixed_precision,
        "compile": params.compile,
        "evaluate_every": params.evaluate_every,
        "gradient_checkpointing": params.gradient_checkpointing,
        "save_every": params.save_every,
        "log_every": min(params.log_every, params.steps),
        "optimizer": {"name": params.optimizer, "learning_rate": params.learning_rate, "warmup": params.warmup},
    }
    config: dict[str, Any] = {"output": str(output), "loop": loop}
    if params.model == "odvae":
        videos = find(params.videos, "videos")
        key = "folder" if videos.is_dir() else "files"
        config["data"] = {key: str(videos), "frames": params.frames, "frame_rate": params.frame_rate,
                          "height": params.height, "width": params.width, "held_out": params.held_out}
        if params.init_from:
            weights = NATURAL_VAE if params.init_from == "shipped" else find(params.init_from, "vae")
            config["model"] = {"init_from": str(weights)}
        return config | {"freeze_encoder": params.freeze_encoder}
    caches = [find(cache, "cache") for cache in params.caches]
    vae = find(params.vae, "vae") if params.vae else find_cache_vae(caches[0], services)
    model: dict[str, Any] = {"preset": params.preset}
    if params.init_from:
        weights = DEMO_TRANSFORMER if params.init_from == "shipped" else find(params.init_from, "pipeline")
        if params.init_from != "shipped" and (kind := pipeline_kind(weights)) not in TRAINABLE:
            raise UserError(f"init_from: is a {kind}, which is not trained here. Choose one of {', '.join(TRAINABLE)}.")
        model = {"init_from": str(weights)} | ({"lora": {"rank": params.lora}} if params.lora else {})
    return config | {
        "vae": str(vae), "condition": params.condition, "model": model,
        "windows": {"caches": [str(cache) for cache in caches], "frames": params.frames, "held_out": params.held_out},
        "sample": {"count": params.samples, "steps": params.sample_steps}}


def run(context: JobContext) -> None:
    params = TrainParams.model_validate(context.job.params)
    context.update_result(model=params.model)  # from now on, a stop keeps the results
    if params.run:
        output = context.services.assets.find(params.run, "run")
        config = output / "config.yaml"
    else:
        output = Path(context.services.config.workspace).absolute() / "runs" / params.name
        config = context.folder / "train.yaml"
        if not config.exists():
            context.report_progress(phase="starting")
            write_text(config, yaml.safe_dump(make_config(params, context.services, output), sort_keys=False))
    changes = {name: value for name, value in context.job.params.items() if params.run and name in RESUMABLE}
    overrides = [f"{RESUMABLE[name]}={json.dumps(value)}" for name, value in changes.items()]
    monitor = TrainingMonitor(context, output, config, params.model, changes)
    try:
        run_command(context, f"{params.model}.cli", [
            "train", config, *overrides, *["--change-schedule"] * ("steps" in changes)], monitor.poll)
    except JobInterrupted as interrupted:
        monitor.poll(last=True)
        if interrupted.signal is JobSignal.STOP and params.model == "lvdm":
            export_stopped(context, output)
        raise
    finally:
        context.services.assets.invalidate()
    monitor.poll(last=True)
    kind: Literal["pipeline", "vae"] = "pipeline" if params.model == "lvdm" else "vae"
    for asset in context.services.assets.list(kind):
        if asset.path == output / kind:
            context.update_result(asset=asset.id, asset_name=asset.name)


def export_stopped(context: JobContext, run: Path) -> None:
    """Export the newest checkpoint of a stopped run as a pipeline for generation."""
    try:
        from app.tasks.export_checkpoint import export

        folder = export(run)
    except (UserError, RuntimeError, OSError) as error:
        context.note(f"The checkpoint could not be exported as a pipeline ({error}). Resume the run, or see the log.")
        return
    if folder is not None:
        context.note(f"The checkpoint is available for generation: {folder.name.replace('-', ' ')}.")


class TrainingMonitor:
    """Copy the log of a run into the job's result, and its samples into the job's folder."""

    def __init__(self, context: JobContext, run: Path, config: Path, model: str, changes: Mapping[str, Any]) -> None:
        self.context, self.run, self.model = context, run, model
        loop = {**yaml.safe_load(config.read_text(encoding="utf-8")).get("loop", {}), **changes}
        self._steps = loop.get("steps")
        self._samples_per_step = loop.get("micro_batch_size", 1) * loop.get("gradient_accumulation_steps", 1)
        self._read_at = -POLL_SECONDS  # on the monotonic clock
        self._modified: tuple[int, ...] = ()
        self._sample: Path | None = None

    def poll(self, last: bool = False) -> None:
        """Publish news; at most every `POLL_SECONDS`, except the `last` time."""
        now = time.monotonic()
        if not last and now - self._read_at < POLL_SECONDS:
            return
        self._read_at = now
        paths = [self.run / "metrics.jsonl", self.run / "speed.jsonl"]
        modified = tuple(path.stat().st_mtime_ns for path in paths if path.exists())
        sample = max((self.run / "samples").glob("step-*.png"), default=None)
        if modified == self._modified and sample == self._sample:
            return
        lines = read_lines(paths[0])
        result = {"series": series_of(lines, LOSSES[self.model]), **self._metrics(lines, read_lines(paths[1]))}
        if sample is not None and sample != self._sample:
            with suppress(OSError, ValueError):  # removed meanwhile; the next poll finds the newest
                convert_to_webp(sample, self.context.folder / "sheet.webp")
                result["sample_step"] = int(sample.stem.rpartition("-")[2])
                self._sample = sample
        self._modified = modified
        self.context.update_result(**result)

    def _metrics(self, lines: Sequence[Mapping[str, float]], speeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        result: dict[str, Any] = {"step": int(lines[-1]["step"]) if lines else 0, "steps": self._steps}
        result["losses"] = {}
        for line in lines:  # the last value of each
            result["losses"] |= {name: value for name, value in line.items() if name not in ("step", "skipped")}
        result["skipped"] = sum(line.get("skipped", 0) > 0 for line in lines)
        if speeds:
            result |= {name: speeds[-1][name] for name in SPEED_METRICS if name in speeds[-1]}
        with suppress(OSError, ValueError, KeyError, TypeError):
            bar = json.loads((self.context.folder / "progress.json").read_text(encoding="utf-8"))
            if bar["title"] == "train":
                result["samples_per_second"] = bar["rate"] * self._samples_per_step
        return result
