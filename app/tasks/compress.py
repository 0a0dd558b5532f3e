"""Encode a video into latents and decode it again, with metrics. Any length, in constant memory.

    latents.safetensors    as `odvae encode` writes and `odvae decode` reads
    original.mp4           the encoded frames: the requested span, resized and cropped
    reconstruction.mp4     the frames decoded from the latents, at the same times and size
    report.json            all metrics, PSNR and SSIM of each frame too
    frames.webp            some frames: original, reconstruction, four times their difference
    poster.webp            a frame of the reconstruction

The file is read twice: to be encoded, and to be compared with the reconstruction. The metrics are of the 8-bit pictures
that a viewer sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from app.tasks.context import Services
from app.tasks.validation import checked
from odvae.utils.errors import UserError

SIZE_MULTIPLE = 8  # pixels
MIN_SIDE = 16  # pixels
TILE_RANGE = (64, 1024)  # pixels: the smallest and the largest side of a tile
MAX_SECONDS = 86400.0
MAX_SIDE = 8192  # pixels
MAX_TITLE = 200  # characters


class CompressParams(BaseModel):
    """The parameters of a compression."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    upload: str = Field(default="", max_length=64)  # an upload's id; or
    job: str = Field(default="", max_length=64)  # the id of a job with a video
    vae: str = Field(default="", max_length=1024)  # the id of an asset; "": the shipped natural VAE
    start: float = Field(default=0.0, ge=0, le=MAX_SECONDS)  # seconds
    seconds: float | None = Field(default=None, gt=0, le=MAX_SECONDS)  # at most; None: to the end
    # pixels; None for both: the largest size that fits
    height: int | None = Field(default=None, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=SIZE_MULTIPLE)
    width: int | None = Field(default=None, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=SIZE_MULTIPLE)
    frame_rate: float | None = Field(default=None, ge=1, le=120)  # frames per second; None: the frames of the file
    tile: int | str | None = "auto"  # pixels a side; "auto": tiles if whole frames do not fit; None: whole frames

    @field_validator("tile", mode="before")
    @classmethod
    def _check_tile(cls, value: object) -> object:
        side = isinstance(value, int | float) and TILE_RANGE[0] <= value <= TILE_RANGE[1] and value % SIZE_MULTIPLE == 0
        if value is None or value == "auto" or side:
            return int(value) if isinstance(value, int | float) else value
        raise ValueError(f'must be "auto", none for whole frames, or a multiple of {SIZE_MULTIPLE} pixels from '
                         f"{TILE_RANGE[0]} to {TILE_RANGE[1]}")


@dataclass(frozen=True)
class SourceVideo:
    """The file to be compressed."""

    path: Path
    name: str  # the user's name for it
    height: int  # pixels, upright
    width: int
    frame_rate: float
    seconds: float


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """Return the parameters with a definite size, and the file name. Raises UserError with a line for each problem."""
    params = _checked(raw)
    source = find_source(params, services, owner)
    if params.vae:
        services.assets.find(params.vae, "vae")
    problems, max_side = [], services.config.max_side
    if params.start >= source.seconds:
        problems.append(f"start: must be before the end at {source.seconds:.2f} s, not {params.start:g} s.")
    if (params.height is None) != (params.width is None):
        problems.append("height, width: give both, or none for the largest size that fits.")
    if max(params.height or 0, params.width or 0) > max_side:
        problems.append(f"height, width: {params.height}x{params.width} is larger than {max_side} a side; give less.")
    height, width = params.height or 0, params.width or 0
    if params.height is None and params.width is None:
        height, width = fit_size(source.height, source.width, max_side)
        if min(height, width) < MIN_SIDE:
            problems.append(f"{source.name}: {source.width}x{source.height} leaves {width}x{height} pixels in blocks "
                            f"of {SIZE_MULTIPLE}, and {MIN_SIDE} a side are needed; set the size.")  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    return {**params.model_dump(), "height": height, "width": width}, source.name[:MAX_TITLE]


def fit_size(height: int, width: int, max_side: int, short: int | None = None) -> tuple[int, int]:
    """Return (height, width) in multiples of 8 for a picture that is shrunk, never enlarged, until its long side has at
    most `max_side` and its short side at most `short` pixels."""
    scale = min(1.0, max_side / max(height, width), (short or math.inf) / min(height, width))
    sides = [SIZE_MULTIPLE * math.floor(side * scale / SIZE_MULTIPLE + 1e-6) for side in (height, width)]
    return sides[0], sides[1]


def _checked(raw: Mapping[str, Any]) -> CompressParams:
    params = checked(CompressParams, raw)
    if bool(params.upload) == bool(params.job):
        raise UserError("video: give the id of either an upload or a job.")
    return params


def find_source(params: CompressParams | Mapping[str, Any], services: Services, owner: str) -> SourceVideo:
    """Return the source video. Raises UserError if the owner has no such upload or job, or it is not a video."""
    params = params if isinstance(params, CompressParams) else _checked(params)
    if params.upload:
        upload = services.uploads.find(params.upload, owner)
        if upload.kind != "video":
            raise UserError(f"{upload.name}: this is a picture. Upload a video.")
        rate, seconds = upload.frame_rate or 25.0, upload.seconds or MAX_SECONDS  # always known of a video
        return SourceVideo(upload.path, upload.name, upload.height, upload.width, rate, seconds)
    job = services.job_files.find(params.job)
    if services.config.credentials and job.owner != owner:
        raise UserError(f"There is no job {job.id} here. It may have been deleted: see the history.")
    return _generated_video(services.job_files.finished_file(job), job.title[:80].strip() or job.id[:8])


def _generated_video(path: Path, title: str) -> SourceVideo:
    """Describe a generated video by its header, which can be trusted."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        return SourceVideo(path, f"{title}.mp4", stream.height, stream.width, rate, stream.frames / rate)
