"""Build a latent cache of a folder of videos, tell beforehand what it would hold, or look into one."""

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

SHOWN = 12  # clips on a contact sheet
REJECTS = 30  # listed one by one
SHEET_BYTES = 2**30  # of the decoded clips of a sheet, as float32
ID = Field("", max_length=32)  # of a place
DEFAULTS = {"sizes": [(64, 64)], "frames": [33], "frame_rate": 8.0, "store": "mean", "dtype": "float16"}


class CacheParams(Config):
    """Raises ValidationError for what no build could take; whether it fits the VAE, the build itself tells."""

    source: str = ID  # the videos
    name: str = Field("", max_length=60)  # of a new cache,
    cache: str = ID  # or one that is there, to grow; its sizes, lengths and rate then hold
    vae: str = ID  # "": natural, which ships, or the one that made the cache
    sizes: list[tuple[int, int]] | None = Field(None, min_length=1, max_length=8)  # (height, width)
    frames: list[int] | None = Field(None, min_length=1, max_length=8)  # 1 + 4k
    frame_rate: float | None = Field(None, ge=0.1, le=120)
    clips: str = Field("back-to-back", max_length=30)  # see `odvae cache build --help`
    store: Literal["mean", "moments"] | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    batch: int = Field(8, ge=1, le=256)
    shard_clips: int = Field(128, ge=1, le=4096)  # a stop costs at most one shard's work
    file_seconds: float = Field(120.0, ge=1, le=3600)
    keep_truncated: bool = False
    retry: bool = False
    dry_run: bool = False  # only tell what a build would do
    look: bool = False  # only look into `cache`: statistics and a contact sheet
    seed: int = Field(0, ge=0, lt=2**31)  # which clips are shown

    @field_validator("sizes")
    @classmethod
    def _sizes_fit(cls, sizes: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        for size in sizes or ():
            if not all(8 <= side <= 4096 and side % 8 == 0 for side in size):
                raise ValueError("each side must be a multiple of 8 from 8 to 4096")
        return sizes

    @field_validator("frames")
    @classmethod
    def _frames_fit(cls, frames: list[int] | None) -> list[int] | None:
        for length in frames or ():
            if not (1 <= length <= 4097 and length % 4 == 1):
                below = max(1, (length - 1) // 4 * 4 + 1)
                raise ValueError(f"a clip has 1 + 4k frames, such as {below} or {below + 4}")
        return frames

    @field_validator("clips")
    @classmethod
    def _clips_are_known(cls, clips: str) -> str:
        found = re.fullmatch(r"back-to-back|whole|scenes|every:(\d+(?:\.\d+)?)|uniform:(\d+)", clips)
        if not found or any(number is not None and not 0 < float(number) <= 86400 for number in found.groups()):
            raise ValueError("give back-to-back, every:SECONDS, uniform:CLIPS, whole or scenes")
        if clips == "scenes" and importlib.util.find_spec("scenedetect") is None:
            raise ValueError("scenes are found by PySceneDetect, which is not installed here; choose another")
        return clips


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """What is asked, checked, with every value that is used."""
    params = checked(CacheParams(), raw, "cache")
    if params.vae:
        services.assets.find(params.vae, "vae")
    old = services.assets.get(params.cache, "cache") if params.cache else None
    if params.look:
        if old is None:
            raise UserError("Pick the cache that you want to look into.")
        looked = {"look": True, "cache": params.cache, "vae": params.vae, "seed": params.seed}
        return params.model_dump(mode="json") | looked, f"Look into {old.name}"
    if not params.source:
        raise UserError("Pick a folder of videos.")
    source = services.assets.get(params.source, "videos")
    if params.name and old:
        raise UserError("Give a name for a new cache, or pick one that is to grow, not both.")
    if old:
        given, title = _as_it_is(params, old.path), old.name
    elif params.name or params.dry_run:
        given, title = {name: value if (got := getattr(params, name)) is None else got
                        for name, value in DEFAULTS.items()}, params.name or source.name
    else:
        raise UserError("Give the new cache a name, or pick one that is to grow.")
    settled = checked(params, given, "cache").model_dump(mode="json")
    if params.name and not params.dry_run:
        check_name("cache", JobKind.CACHE, settled, services)
    return settled, f"{'What would be in' if params.dry_run else 'Grow' if old else 'Build'} {title}"


def checked(schema: Any, raw: Mapping[str, Any], where: str) -> Any:
    """`schema` with what came in. Raises UserError with a line for each mistake; whatever came in, they are short."""
    if not all(isinstance(key, str) for key in raw):
        raise UserError(f"{where}: every name of a setting must be text")
    try:
        return override(schema, {key[:80]: value for key, value in raw.items()}, where)
    except UserError as error:
        lines = [line if len(line) <= 300 else f"{line[:100]} ... {line[-150:]}" for line in str(error).splitlines()]
        raise UserError("\n".join(lines[:20])) from error


def check_name(kind: Literal["cache", "run"], job_kind: JobKind, params: dict[str, Any], services: Services) -> None:
    """Raises UserError where the name of what is new is none, is taken, or will be by a job that waits. The very same
    job once more goes on with what the first one made."""
    jobs = [job for job in services.store.find(kinds=[job_kind], limit=-1) if job.params.get("name") == params["name"]
            and not job.params.get("dry_run")]
    if any(job.params == params for job in jobs):
        return
    if any(not job.state.ended for job in jobs):
        raise UserError(f"A job of the name {params['name']} waits or runs already. Choose another name.")
    services.assets.reserve_path(kind, params["name"], services.config.workspace)


def _as_it_is(params: CacheParams, cache: Path) -> dict[str, Any]:
    """What the cache was made with. Raises UserError where something else is asked for."""
    header = read_json(cache / "header.json")
    try:
        transform = header["transform"]
        there = {"sizes": [tuple(size) for size in transform["sizes"]], "frames": transform["frames"] or None,
                 "frame_rate": transform["frame_rate"], "store": header["stored"], "dtype": header["dtype"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{cache.name} cannot be read: its header.json is damaged. Build it anew.") from error
    for name, value in there.items():
        requested = getattr(params, name)
        if requested is not None and requested != value:
            raise UserError(f"{cache.name} was made with {name.replace('_', ' ')} {value}, and {requested} is asked "
                            f"for: leave it out, or build a new cache.")
    return there


def run(context: JobContext) -> None:
    params = CacheParams.model_validate(context.job.params)
    context.update_result()  # it is begun: whoever stops it now keeps what is there
    places = context.services.assets
    if params.look:
        cache = places.find(params.cache, "cache")
        inspect_cache(context, cache, params)
        return
    if params.cache:
        cache = places.find(params.cache, "cache")
    elif params.name:
        cache = Path(context.services.config.workspace).absolute() / "caches" / params.name
    else:
        cache = context.folder / "scan"
    vae = _vae(params.vae, cache, context)
    arguments = _arguments(params, places.find(params.source, "videos"), cache, vae)
    seen = [0]

    def on_poll() -> None:
        """A shard more: it is getting on."""
        if (now := sum(1 for _ in (cache / "shards").glob("[!.]*.parquet"))) != seen[0]:
            seen[0] = now
            context.update_result(shards=now)

    try:
        lines = run_command(context, "odvae.cli", arguments, on_poll)
    except JobInterrupted as interrupted:
        if interrupted.signal is JobSignal.STOP and not params.dry_run:
            context.update_result(**cache_summary(cache))
        raise
    finally:
        places.invalidate()
    if params.dry_run:
        context.update_result(report=lines)
        return
    rate = next((float(found[1]) for line in lines if (found := re.match(r"([\d.]+) frames a second", line))), None)
    context.update_result(report=lines, frames_per_second=rate, **cache_summary(cache))
    inspect_cache(context, cache, params, vae)


def _arguments(params: CacheParams, source: Path, cache: Path, vae: Path) -> list[str | Path]:
    # What is set aside is shown with its reasons: for the page it is no failure of the job.
    arguments: list[str | Path] = ["cache", "build", source, cache, "--vae", vae, "--clips", params.clips,
                                   "--max-set-aside", "1"]
    for height, width in params.sizes or ():
        arguments += ["--size", str(height), str(width)]
    if params.frames:
        arguments += ["--frames", *map(str, params.frames)]
    for name in ("frame_rate", "store", "dtype", "batch", "shard_clips", "file_seconds"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(params, name))]
    return arguments + [f"--{name.replace('_', '-')}" for name in ("keep_truncated", "retry", "dry_run")
                        if getattr(params, name)]


def _vae(chosen: str, cache: Path, context: JobContext) -> Path:
    """The folder of the VAE to use: the one that was chosen, else the cache's own, else natural."""
    if chosen:
        return context.services.assets.find(chosen, "vae")
    return find_cache_vae(cache, context.services) if (cache / "header.json").is_file() else NATURAL_VAE


def find_cache_vae(cache: Path, services: Services) -> Path:
    """The folder of the VAE that made a cache, among those that ship and that lie in the places.

    Raises:
        UserError: it is none of them, or the cache is damaged.
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
        except (OSError, ValueError):  # it is no VAE that can be loaded
            continue
    raise UserError(f"The VAE that made {cache.name} ({header.vae.kind}, {header.vae.latent_channels} channels) is not "
                    f"among the folders here. Put it below one of them, then pick it.")


def cache_summary(cache: Path) -> dict[str, Any]:
    """What a cache holds, in numbers and in words; empty where it holds nothing yet."""
    from odvae.cache.inspect import read_rejects, stats
    from odvae.cache.reader import LatentCache

    summary: dict[str, Any] = {"clips": 0}
    rows = read_rejects(cache).to_pylist()
    if rows:
        summary["set_aside"] = Counter(row["kind"] for row in rows).most_common()
        summary["rejects"] = [{key: row[key] for key in ("path", "reason", "advice")} for row in rows[:REJECTS]]
    try:
        opened = LatentCache(cache)
    except UserError as error:  # no clips, or not even a header
        return summary | {"stats": [str(error)]}
    columns = [opened.column(name).to_numpy() for name in ("frames", "height", "width")]
    raw = int((columns[0].astype("int64") * columns[1] * columns[2]).sum()) * 3
    size = sum(path.stat().st_size for path in (cache / "shards").iterdir() if path.is_file())
    return summary | {"clips": len(opened), "frames": int(columns[0].sum()), "bytes": size, "raw_bytes": raw,
                   "ratio": raw / max(1, size), "stats": stats(cache)}


def inspect_cache(context: JobContext, cache: Path, params: CacheParams, vae: Path | None = None) -> None:
    """Publish the figures and a contact sheet of a cache, with `vae` or the one that made it."""
    context.report_progress(phase="looking into it", done=0, total=0, seconds_left=None, detail="")
    summary = cache_summary(cache)
    context.update_result(**summary)
    if not summary["clips"]:
        return
    import torch

    from odvae.cache.inspect import show
    from odvae.cache.reader import LatentCache
    from odvae.inference.adapters import load_autoencoder

    context.models.unload()
    model = load_autoencoder(str(vae or _vae(params.vae, cache, context))).model.to(context.models.device)
    opened = LatentCache(cache)
    pixels = int(opened.column("frames").to_numpy().max()) * max(h * w for h, w in opened.header.transform.sizes)
    sheet = context.folder / "sheet.png"
    try:
        show(cache, model, sheet, max(1, min(SHOWN, SHEET_BYTES // (12 * pixels))), seed=params.seed)
    except (torch.OutOfMemoryError, MemoryError):
        context.note("There was not enough memory to decode clips for a contact sheet.")
        return
    finally:
        del model
        context.models.unload()
    as_webp(sheet, context.folder / "sheet.webp")
    sheet.unlink()
    context.update_result(sheet=True)


def as_webp(source: Path, target: Path) -> None:
    """A picture as WebP, made smaller where that format cannot hold it; written atomically."""
    from PIL import Image

    with Image.open(source) as picture:
        picture.load()
        small = picture.convert("RGB")
    small.thumbnail((16_000, 16_000))
    with atomic_path(target) as temporary:
        small.save(temporary, format="WEBP", quality=88)
