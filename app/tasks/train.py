"""Train an LVDM on caches or an OD-VAE on videos; follow it, stop it, go on with it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from app.storage.assets import kind_of_run
from app.storage.jobs import JobKind, JobSignal
from app.tasks.cache import ID, as_webp, check_name, checked, find_cache_vae
from app.tasks.context import JobContext, JobInterrupted, Services
from app.tasks.run_command import run_command
from app.tasks.training_log import read_lines, series_of
from lvdm.model.presets import PRESETS
from lvdm.weights import DEMO_TRANSFORMER
from odvae.utils.config import Config
from odvae.utils.errors import UserError
from odvae.utils.files import write_text
from odvae.weights import NATURAL_VAE

READ = 2.0  # seconds between two looks at what the training has logged
LOSSES = {"lvdm": ("loss", "loss_heldout"), "odvae": ("loss", "l1", "l2", "perceptual")}
# What a training that is there can be given anew, and its key in the config: nothing of what is learned but the steps.
RESUMABLE = {"steps": "loop.steps", "micro_batch_size": "loop.micro_batch_size",
             "gradient_accumulation_steps": "loop.gradient_accumulation_steps", "compile": "loop.compile",
             "gradient_checkpointing": "loop.gradient_checkpointing", "evaluate_every": "loop.evaluate_every",
             "save_every": "loop.save_every", "log_every": "loop.log_every", "samples": "sample.count",
             "sample_steps": "sample.steps"}  # fmt: skip
FIGURES = ("frames_per_second", "tokens_per_second", "mfu", "data_wait")  # of speed.jsonl


class TrainParams(Config):
    """Raises ValidationError for what no training could take; whether it fits the data, the command itself tells."""

    what: Literal["lvdm", "odvae"] = "lvdm"
    name: str = Field("", max_length=60)  # of a new run,
    run: str = ID  # or one that is there, to go on with; then of all else only `RESUMABLE` can be given
    caches: tuple[str, ...] = Field((), max_length=8)  # of an LVDM: places
    videos: str = ID  # of an OD-VAE: a place
    vae: str = ID  # of an LVDM: "": found, as it made the cache
    warm: str = ID  # weights to begin from; "": new ones; "shipped"; a pipeline, or for an OD-VAE a VAE
    preset: str = Field("5m", max_length=10)  # of new weights of an LVDM
    lora: int = Field(0, ge=0, le=256)  # rank of what is trained beside `warm`; 0: all of it
    condition: Literal["text", "class", "none"] = "text"
    frames: int = Field(17, ge=1, le=1025)  # 1 + 4k
    height: int = Field(64, ge=8, le=1024)  # of an OD-VAE's windows
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
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    held_out: int = Field(16, ge=0, le=10_000)
    evaluate_every: int = Field(500, ge=1, le=10_000_000)
    save_every: int = Field(500, ge=1, le=10_000_000)
    log_every: int = Field(10, ge=1, le=1_000_000)
    samples: int = Field(4, ge=0, le=32)  # videos that an LVDM makes at each evaluation
    sample_steps: int = Field(20, ge=1, le=200)

    @field_validator("caches")
    @classmethod
    def _ids_are_short(cls, caches: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(one) > 32 for one in caches):
            raise ValueError("each must be one of the list")
        return caches

    @field_validator("frames")
    @classmethod
    def _frames_fit(cls, frames: int) -> int:
        if frames % 4 != 1:
            below = (frames - 1) // 4 * 4 + 1
            raise ValueError(f"a window has 1 + 4k frames, such as {below} or {below + 4}")
        return frames

    @field_validator("height", "width")
    @classmethod
    def _sides_fit(cls, side: int) -> int:
        if side % 8:
            raise ValueError(f"must be a multiple of 8, such as {side // 8 * 8} or {side // 8 * 8 + 8}")
        return side

    @field_validator("preset")
    @classmethod
    def _preset_is_known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"there are {', '.join(PRESETS)}")
        return preset


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """What is asked, checked, with every value that is used."""
    params = checked(TrainParams(), raw, "training")
    if params.run:
        if params.name:
            raise UserError("Give a name for a new training, or pick one to go on with, not both.")
        place = services.assets.get(params.run, "run")
        _check_place(asset.path)
        what = kind_of_run(asset.path) or "lvdm"
        given = raw.keys() - {"run", "name", "what"}
        fixed = given - RESUMABLE.keys() | (given & {"samples", "sample_steps"} if what == "odvae" else set())
        if fixed:
            raise UserError(f"{', '.join(sorted(fixed))}: cannot be changed in a training that is there. Leave it out, "
                            f"or begin a new one.")
        changes = {name: getattr(params, name) for name in sorted(given)}
        return {"run": params.run, "what": what, **changes}, f"Go on with {asset.name}"
    if not params.name:
        raise UserError("Give the new training a name, or pick one to go on with.")
    lvdm = params.what == "lvdm"
    if lvdm and not params.caches:
        raise UserError("Pick the latent cache that it is to learn from; build one from your videos first.")
    if not lvdm and not params.videos:
        raise UserError("Pick the folder of videos that it is to learn from.")
    for cache in params.caches if lvdm else ():
        services.assets.find(cache, "cache")
    if not lvdm:
        services.assets.find(params.videos, "videos")
    if params.warm not in ("", "shipped"):
        services.assets.find(params.warm, "pipeline" if lvdm else "vae")
    if lvdm and params.vae:
        services.assets.find(params.vae, "vae")
    if params.lora and not (lvdm and params.warm):
        raise UserError("A LoRA adds to trained weights of an LVDM: pick those to begin from.")
    settled = params.model_dump(mode="json")
    check_name("run", JobKind.TRAIN, settled, services)
    return settled, f"Train {params.name}"


def _check_place(run: Path) -> None:
    """A run's config names its own folder; where that is another one, the command would go on there."""
    try:
        output = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["output"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{run.name} cannot be gone on with: its config.yaml is damaged.") from error
    if Path(output).absolute() != run:
        raise UserError(f"{run.name} cannot be gone on with: it was begun in {output}. Move it back there, or begin a "
                        f"new one from its weights.")


def config_of(params: TrainParams, services: Services, output: Path) -> dict[str, Any]:
    """The config of `lvdm train` or `odvae train`, as plain values. May load VAEs, to find a cache's own."""
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
    if params.what == "odvae":
        videos = find(params.videos, "videos")
        where = "folder" if videos.is_dir() else "files"
        config["data"] = {where: str(videos), "frames": params.frames, "frame_rate": params.frame_rate,
                          "height": params.height, "width": params.width, "held_out": params.held_out}
        if params.warm:
            config["model"] = {"init_from": str(NATURAL_VAE if params.warm == "shipped" else find(params.warm, "vae"))}
        return config | {"freeze_encoder": params.freeze_encoder}
    caches = [find(cache, "cache") for cache in params.caches]
    vae = find(params.vae, "vae") if params.vae else find_cache_vae(caches[0], services)
    model: dict[str, Any] = {"preset": params.preset}
    if params.warm:
        weights = DEMO_TRANSFORMER if params.warm == "shipped" else find(params.warm, "pipeline")
        model = {"init_from": str(weights)} | ({"lora": {"rank": params.lora}} if params.lora else {})
    return config | {
        "vae": str(vae), "condition": params.condition, "model": model,
        "windows": {"caches": [str(cache) for cache in caches], "frames": params.frames, "held_out": params.held_out},
        "sample": {"count": params.samples, "steps": params.sample_steps}}


def run(context: JobContext) -> None:
    params = TrainParams.model_validate(context.job.params)
    context.update_result(what=params.what)  # it is begun: whoever stops it now keeps what is there
    if params.run:
        output = context.services.assets.find(params.run, "run")
        config = output / "config.yaml"
    else:
        output = Path(context.services.config.workspace).absolute() / "runs" / params.name
        config = context.folder / "train.yaml"
        if not config.exists():
            context.report_progress(phase="starting")
            write_text(config, yaml.safe_dump(config_of(params, context.services, output), sort_keys=False))
    changes = {name: value for name, value in context.job.params.items() if params.run and name in RESUMABLE}
    more = [f"{RESUMABLE[name]}={json.dumps(value)}" for name, value in changes.items()]
    follower = TrainingMonitor(context, output, config, params.what, changes)
    try:
        run_command(context, f"{params.what}.cli", [
            "train", config, *more, *["--change-schedule"] * ("steps" in changes)], follower.poll)
    except JobInterrupted as interrupted:
        follower.poll(last=True)
        if interrupted.signal is JobSignal.STOP and params.what == "lvdm":
            keep_stopped(context, output)
        raise
    finally:
        context.services.assets.invalidate()
    follower.poll(last=True)
    kind: Literal["pipeline", "vae"] = "pipeline" if params.what == "lvdm" else "vae"
    for asset in context.services.assets.list(kind):
        if asset.path == output / kind:
            context.update_result(place=asset.id, made=asset.name)


def keep_stopped(context: JobContext, run: Path) -> None:
    """Make a pipeline of the newest checkpoint of a training that was stopped, so that it can be generated with."""
    try:
        from app.tasks.export_checkpoint import export

        folder = export(run)
    except (UserError, RuntimeError, OSError) as error:
        context.note(
            f"No pipeline could be made of what was trained so far ({error}); go on with it, or look at the log."
        )
        return
    if folder is not None:
        context.note(f"What was trained so far can be picked for generation: {folder.name.replace('-', ' ')}.")


class TrainingMonitor:
    """Reads what a training logs into the job's result, and its samples into the job's folder."""

    def __init__(self, context: JobContext, run: Path, config: Path, what: str, changes: Mapping[str, Any]) -> None:
        self.context, self.run, self.what = context, run, what
        loop = {**yaml.safe_load(config.read_text(encoding="utf-8")).get("loop", {}), **changes}
        self._steps, self._samples = (
            loop.get("steps"),
            loop.get("micro_batch_size", 1) * loop.get("gradient_accumulation_steps", 1),
        )
        self._read_at = -READ  # on the monotonic clock
        self._stamp: tuple[int, ...] = ()
        self._sample: Path | None = None

    def poll(self, last: bool = False) -> None:
        """Publish what is new; at most every `READ` seconds, except the `last` time."""
        now = time.monotonic()
        if not last and now - self._read_at < READ:
            return
        self._read_at = now
        paths = [self.run / "metrics.jsonl", self.run / "speed.jsonl"]
        stamp = tuple(path.stat().st_mtime_ns for path in paths if path.exists())
        sample = max((self.run / "samples").glob("step-*.png"), default=None)
        if stamp == self._stamp and sample == self._sample:
            return
        lines = read_lines(paths[0])
        result = {"series": series_of(lines, LOSSES[self.what]), **self._figures(lines, read_lines(paths[1]))}
        if sample is not None and sample != self._sample:
            with suppress(OSError, ValueError):  # it went away meanwhile; the next look finds what is there
                as_webp(sample, self.context.folder / "sheet.webp")
                result["sample_step"] = int(sample.stem.rpartition("-")[2])
                self._sample = sample
        self._stamp = stamp
        self.context.update_result(**result)

    def _figures(self, lines: Sequence[Mapping[str, float]], speeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        result: dict[str, Any] = {"step": int(lines[-1]["step"]) if lines else 0, "steps": self._steps}
        result["losses"] = {}
        for line in lines:  # the last that is known of each
            result["losses"] |= {name: value for name, value in line.items() if name not in ("step", "skipped")}
        result["skipped"] = sum(line.get("skipped", 0) > 0 for line in lines)
        if speeds:
            result |= {name: speeds[-1][name] for name in FIGURES if name in speeds[-1]}
        with suppress(OSError, ValueError, KeyError, TypeError):
            bar = json.loads((self.context.folder / "progress.json").read_text(encoding="utf-8"))
            if bar["title"] == "train":
                result["samples_per_second"] = bar["rate"] * self._samples
        return result
