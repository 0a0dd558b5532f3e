"""Build a latent cache from a folder of videos, dry-run the build, or inspect a cache."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from app.storage.jobs import JobKind, JobSignal
from app.tasks.context import JobContext, JobInterrupted, Services
from app.tasks.run_command import run_command
from odvae.utils.config import Config, override
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_path, read_json
from odvae.weights import DEMO_VAE, NATURAL_VAE

SHEET_CLIPS = 12  # on a contact sheet
MAX_REJECTS = 30  # listed one by one
SHEET_BYTES = 2**30  # of the decoded clips of a contact sheet, as float32
ID = Field("", max_length=32)  # of an asset
DEFAULTS = {"sizes": [(64, 64)], "frames": [33], "frame_rate": 8.0, "store": "mean", "dtype": "float16"}


class CacheParams(Config):
    """The parameters of a build or an inspection. Whether they fit the VAE, the build itself checks."""

    source: str = ID  # the videos
    name: str = Field("", max_length=60)  # of a new cache; or
    cache: str = ID  # an existing one to extend, with its own sizes, lengths and frame rate
    vae: str = ID  # "": the VAE of the cache, or the shipped natural VAE
    sizes: list[tuple[int, int]] | None = Field(None, min_length=1, max_length=8)  # (height, width)
    frames: list[int] | None = Field(None, min_length=1, max_length=8)  # 1 + 4k
    frame_rate: float | None = Field(None, ge=0.1, le=120)
    clips: str = Field("back-to-back", max_length=30)  # see `odvae cache build --help`
    store: Literal["mean", "moments"] | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    batch: int = Field(8, ge=1, le=256)
    shard_clips: int = Field(128, ge=1, le=4096)  # an interruption loses at most one shard
    file_seconds: float = Field(120.0, ge=1, le=3600)
    keep_truncated: bool = False
    retry: bool = False
    dry_run: bool = False  # only report what a build would do
    inspect: bool = False  # only report statistics and a contact sheet of `cache`
    seed: int = Field(0, ge=0, lt=2**31)  # of the choice of clips on the contact sheet

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        for size in sizes or ():
            if not all(8 <= side <= 4096 and side % 8 == 0 for side in size):
                raise ValueError("each side must be a multiple of 8 from 8 to 4096")
        return sizes

    @field_validator("frames")
    @classmethod
    def _check_frames(cls, frames: list[int] | None) -> list[int] | None:
        for length in frames or ():
            if not (1 <= length <= 4097 and length % 4 == 1):
                below = max(1, (length - 1) // 4 * 4 + 1)
                raise ValueError(f"a clip has 1 + 4k frames, such as {below} or {below + 4}")
        return frames

    @field_validator("clips")
    @classmethod
    def _check_clips(cls, clips: str) -> str:
        match = re.fullmatch(r"back-to-back|whole|scenes|every:(\d+(?:\.\d+)?)|uniform:(\d+)", clips)
        if not match or any(number is not None and not 0 < float(number) <= 86400 for number in match.groups()):
            raise ValueError("must be back-to-back, every:SECONDS, uniform:CLIPS, whole or scenes")
        if clips == "scenes" and importlib.util.find_spec("scenedetect") is None:
            raise ValueError("scenes needs PySceneDetect, which is not installed; choose another policy")
        return clips


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """Validate the parameters and fill in the defaults. Raises UserError."""
    params = checked(CacheParams(), raw, "cache")
    if params.vae:
        services.assets.find(params.vae, "vae")
    existing = services.assets.get(params.cache, "cache") if params.cache else None
    if params.inspect:
        if existing is None:
            raise UserError("Pick the cache to inspect.")
        return params.model_dump(mode="json"), f"Inspect {existing.name}"
    if not params.source:
        raise UserError("Pick a folder of videos.")
    source = services.assets.get(params.source, "videos")
    if params.name and existing:
        raise UserError("Give a name for a new cache, or pick an existing one, not both.")
    if existing:
        values, title = _existing_settings(params, existing.path), existing.name
    elif params.name or params.dry_run:
        values = {name: default if (value := getattr(params, name)) is None else value
                  for name, default in DEFAULTS.items()}
        title = params.name or source.name
    else:
        raise UserError("Give the new cache a name, or pick an existing one.")
    raw_params = checked(params, values, "cache").model_dump(mode="json")
    if params.name and not params.dry_run:
        check_name("cache", JobKind.CACHE, raw_params, services)
    return raw_params, f"{'Dry run of' if params.dry_run else 'Extend' if existing else 'Build'} {title}"


def checked(schema: Any, raw: Mapping[str, Any], where: str) -> Any:
    """Override the values of `schema` by `raw`. Raises UserError with one short line for each invalid value."""
    if not all(isinstance(key, str) for key in raw):
        raise UserError(f"{where}: every name of a setting must be a string")
    try:
        return override(schema, {key[:80]: value for key, value in raw.items()}, where)
    except UserError as error:
        lines = [line if len(line) <= 300 else f"{line[:100]} ... {line[-150:]}" for line in str(error).splitlines()]
        raise UserError("\n".join(lines[:20])) from error


def check_name(kind: Literal["cache", "run"], job_kind: JobKind, params: dict[str, Any], services: Services) -> None:
    """Raise UserError if the name is invalid, or taken by a folder or an unfinished job. A job with the same params
    may have the same name: it resumes the first one."""
    jobs = [job for job in services.store.find(kinds=[job_kind], limit=-1) if job.params.get("name") == params["name"]
            and not job.params.get("dry_run")]
    if any(job.params == params for job in jobs):
        return
    if any(not job.state.ended for job in jobs):
        raise UserError(f"A job named {params['name']} is already queued or running. Choose another name.")
    services.assets.reserve_path(kind, params["name"], services.config.workspace)


def _existing_settings(params: CacheParams, cache: Path) -> dict[str, Any]:
    """Return the settings that a cache was built with. Raises UserError if `params` differ from them."""
    header = read_json(cache / "header.json")
    try:
        transform = header["transform"]
        settings = {"sizes": [tuple(size) for size in transform["sizes"]], "frames": transform["frames"] or None,
                    "frame_rate": transform["frame_rate"], "store": header["stored"], "dtype": header["dtype"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{cache.name} cannot be read: its header.json is damaged. Build it again.") from error
    for name, value in settings.items():
        requested = getattr(params, name)
        if requested is not None and requested != value:
            raise UserError(f"{cache.name} was built with {name.replace('_', ' ')} {value}, not {requested}: omit it, "
                            f"or build a new cache.")
    return settings


def run(context: JobContext) -> None:
    params = CacheParams.model_validate(context.job.params)
    context.update_result()  # from now on, a stop keeps the results
    assets = context.services.assets
    if params.inspect:
        cache = assets.find(params.cache, "cache")
        inspect_cache(context, cache, params)
        return
    if params.cache:
        cache = assets.find(params.cache, "cache")
    elif params.name:
        cache = Path(context.services.config.workspace).absolute() / "caches" / params.name
    else:
        cache = context.folder / "scan"
    vae = _vae(params.vae, cache, context)
    arguments = _arguments(params, assets.find(params.source, "videos"), cache, vae)
    shards = 0

    def on_poll() -> None:
        """Publish each new shard: it is progress."""
        nonlocal shards
        if (count := sum(1 for _ in cache.glob("partitions/*/[!.]*.safetensors"))) != shards:
            shards = count
            context.update_result(shards=count)

    try:
        lines = run_command(context, "odvae.cli", arguments, on_poll)
    except JobInterrupted as interrupted:
        if interrupted.signal is JobSignal.STOP and not params.dry_run:
            context.update_result(**cache_summary(cache))
        raise
    finally:
        assets.invalidate()
    if params.dry_run:
        context.update_result(report=lines)
        return
    rate = next((float(match[1]) for line in lines if (match := re.match(r"([\d.]+) frames/s", line))), None)
    context.update_result(report=lines, frames_per_second=rate, **cache_summary(cache))
    inspect_cache(context, cache, params, vae)


def _arguments(params: CacheParams, source: Path, cache: Path, vae: Path) -> list[str | Path]:
    # The page lists rejected clips with their reasons: they do not fail the job.
    arguments: list[str | Path] = ["cache", "build", source, cache, "--vae", vae, "--clips", params.clips,
                                   "--max-set-aside", "1"]
    for height, width in params.sizes or ():
        arguments += ["--size", str(height), str(width)]
    if params.frames:
        arguments += ["--frames", *map(str, params.frames)]
    arguments += ["--store-dtype", str(params.dtype)]
    for name in ("frame_rate", "store", "batch", "shard_clips", "file_seconds"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(params, name))]
    return arguments + [f"--{name.replace('_', '-')}" for name in ("keep_truncated", "retry", "dry_run")
                        if getattr(params, name)]


def _vae(chosen: str, cache: Path, context: JobContext) -> Path:
    """Return the folder of the VAE: the chosen one, else the cache's own, else the natural VAE."""
    if chosen:
        return context.services.assets.find(chosen, "vae")
    return find_cache_vae(cache, context.services) if (cache / "header.json").is_file() else NATURAL_VAE


def find_cache_vae(cache: Path, services: Services) -> Path:
    """Return the folder of the VAE that a cache was built with, among the shipped ones and the assets.

    Raises:
        UserError: there is none, or the cache is damaged.
    """
    from odvae.cache import format as fmt
    from odvae.inference.adapters import load_autoencoder
    from odvae.inference.fingerprint import vae_fingerprint

    header = fmt.read_header(cache)
    candidates = [NATURAL_VAE, DEMO_VAE, *(asset.path for asset in services.assets.list("vae")),
                  *(asset.path / "vae" for asset in services.assets.list("pipeline"))]
    for folder in dict.fromkeys(candidates):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if all(config.get(key) == value for key, value in header.vae.config.items()) and \
                    vae_fingerprint(load_autoencoder(str(folder)).model) == header.vae.fingerprint:
                return folder
        except (OSError, ValueError):  # not a loadable VAE
            continue
    raise UserError(f"The VAE of {cache.name} ({header.vae.kind}, {header.vae.latent_channels} channels) is not "
                    f"below the app's folders. Move it there, then pick it.")


def cache_summary(cache: Path) -> dict[str, Any]:
    """Return numbers, rejects and statistics of a cache."""
    from odvae.cache.maintain.rejects import read_rejects
    from odvae.cache.maintain.statistics import stats
    from odvae.cache.reader import LatentCache

    summary: dict[str, Any] = {"clips": 0}
    rows = read_rejects(cache).to_pylist()
    if rows:
        summary["rejected"] = Counter(row["kind"] for row in rows).most_common()
        summary["rejects"] = [{key: row[key] for key in ("path", "reason", "advice")} for row in rows[:MAX_REJECTS]]
    try:
        reader = LatentCache(cache)
    except UserError as error:  # no clips, or no header yet
        return summary | {"stats": [str(error)]}
    columns = [reader.column(name).to_numpy() for name in ("frames", "height", "width")]
    raw_bytes = int((columns[0].astype("int64") * columns[1] * columns[2]).sum()) * 3
    size = sum(path.stat().st_size for path in cache.glob("partitions/*/*.safetensors"))
    return summary | {"clips": len(reader), "frames": int(columns[0].sum()), "bytes": size, "raw_bytes": raw_bytes,
                      "ratio": raw_bytes / max(1, size), "stats": stats(cache)}


def inspect_cache(context: JobContext, cache: Path, params: CacheParams, vae: Path | None = None) -> None:
    """Publish the summary and a contact sheet of a cache, decoded by `vae` or the cache's own."""
    context.report_progress(phase="inspecting", done=0, total=0, seconds_left=None, detail="")
    summary = cache_summary(cache)
    context.update_result(**summary)
    if not summary["clips"]:
        return
    import torch

    from odvae.cache.maintain.show import show
    from odvae.cache.reader import LatentCache
    from odvae.inference.adapters import load_autoencoder

    context.models.unload()
    model = load_autoencoder(str(vae or _vae(params.vae, cache, context))).model.to(context.models.device)
    reader = LatentCache(cache)
    pixels = int(reader.column("frames").to_numpy().max()) * max(h * w for h, w in reader.header.transform.sizes)
    sheet = context.folder / "sheet.png"
    try:
        show(cache, model, sheet, max(1, min(SHEET_CLIPS, SHEET_BYTES // (12 * pixels))), seed=params.seed)
    except (torch.OutOfMemoryError, MemoryError):
        context.note("There was too little memory to decode a contact sheet.")
        return
    finally:
        del model
        context.models.unload()
    convert_to_webp(sheet, context.folder / "sheet.webp")
    sheet.unlink()
    context.update_result(sheet=True)


def convert_to_webp(source: Path, target: Path) -> None:
    """Convert a picture to WebP, scaled down to the limits of the format; write it atomically."""
    from PIL import Image

    with Image.open(source) as image:
        image.load()
        converted = image.convert("RGB")
    converted.thumbnail((16_000, 16_000))
    with atomic_path(target) as temporary:
        converted.save(temporary, format="WEBP", quality=88)
