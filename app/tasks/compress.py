"""`compress`: a video's latents, and what the OD-VAE keeps of it. Of any length, in constant memory.

    latents.safetensors    as `odvae encode` writes them; `odvae decode` reads them
    original.mp4           what was encoded: the span that was asked for, resized and cropped
    reconstruction.mp4     the same frames from the latents, at the same times and size
    report.json            every figure, the two of each frame too
    frames.webp            some frames: original, reconstruction, four times their difference
    poster.webp            a frame of the reconstruction

The file is read twice: once to be encoded, once to be compared with what the latents give back. Figures are of the
8-bit pictures, which are what a viewer sees.
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

UNIT = 8  # pixels: both sides are multiples of it
LEAST = 16  # pixels a side
TILES = (64, 1024)  # pixels: the least and the most that a tile's side can be
MOST_SECONDS = 86400.0
MOST_SIDE = 8192
TITLE = 200  # characters


class CompressParams(BaseModel):
    """What is to be compressed, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    upload: str = Field(default="", max_length=64)  # an upload's id; or
    job: str = Field(default="", max_length=64)  # the id of a job that made a video
    vae: str = Field(default="", max_length=1024)  # a place's id; "": the natural VAE that ships
    start: float = Field(default=0.0, ge=0, le=MOST_SECONDS)  # s
    seconds: float | None = Field(default=None, gt=0, le=MOST_SECONDS)  # at most; None: to the end
    height: int | None = Field(default=None, ge=LEAST, le=MOST_SIDE, multiple_of=UNIT)  # pixels; None, both: what fits
    width: int | None = Field(default=None, ge=LEAST, le=MOST_SIDE, multiple_of=UNIT)
    frame_rate: float | None = Field(default=None, ge=1, le=120)  # a second; None: the file's own frames
    tile: int | str | None = "auto"  # pixels a side; "auto": whole frames where they fit; None: whole frames

    @field_validator("tile", mode="before")
    @classmethod
    def _known_tile(cls, value: object) -> object:
        side = isinstance(value, int | float) and TILES[0] <= value <= TILES[1] and value % UNIT == 0
        if value is None or value == "auto" or side:
            return int(value) if isinstance(value, int | float) else value
        raise ValueError(f'must be "auto", none for whole frames, or a multiple of {UNIT} pixels from {TILES[0]} to '
                         f"{TILES[1]}")


@dataclass(frozen=True)
class SourceVideo:
    """The file that is read."""

    path: Path
    name: str  # as its user called it
    height: int  # pixels, upright
    width: int
    frame_rate: float
    seconds: float


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    """What is used, with the size found out, and the file's name. Raises UserError with a line for each mistake."""
    params = _checked(raw)
    source = source_of(params, services, owner)
    if params.vae:
        services.assets.find(params.vae, "vae")
    problems, most = [], services.config.max_side
    if params.start >= source.seconds:
        problems.append(f"start: the video lasts {source.seconds:.2f} s, there is nothing after {params.start:g} s.")
    if (params.height is None) != (params.width is None):
        problems.append("height, width: give both, or none for the largest size that fits.")
    if max(params.height or 0, params.width or 0) > most:
        problems.append(f"height, width: {params.height}x{params.width} is more than {most} pixels a side; give less.")
    height, width = params.height or 0, params.width or 0
    if params.height is None and params.width is None:
        height, width = fitting(source.height, source.width, most)
        if min(height, width) < LEAST:
            problems.append(f"{source.name}: {source.width}x{source.height} leaves {width}x{height} pixels in blocks "
                            f"of {UNIT}, and {LEAST} a side are needed; give a height and a width.")  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    return {**params.model_dump(), "height": height, "width": width}, source.name[:TITLE]


def fitting(height: int, width: int, most: int, short: int | None = None) -> tuple[int, int]:
    """(height, width) in multiples of 8 of a picture that is shrunk, never enlarged, until its long side is at most
    `most` and its short side at most `short` pixels."""
    scale = min(1.0, most / max(height, width), (short or math.inf) / min(height, width))
    near = [UNIT * math.floor(side * scale / UNIT + 1e-6) for side in (height, width)]
    return near[0], near[1]


def _checked(raw: Mapping[str, Any]) -> CompressParams:
    params = checked(CompressParams, raw)
    if bool(params.upload) == bool(params.job):
        raise UserError("video: give either the id of an upload or that of a job, and not both.")
    return params


def source_of(params: CompressParams | Mapping[str, Any], services: Services, owner: str) -> SourceVideo:
    """Raises UserError where there is no such upload or job of the owner's, or it is no video."""
    params = params if isinstance(params, CompressParams) else _checked(params)
    if params.upload:
        found = services.uploads.find(params.upload, owner)
        if found.kind != "video":
            raise UserError(f"{found.name}: this is a picture. Upload a video.")
        rate, seconds = found.frame_rate or 25.0, found.seconds or MOST_SECONDS  # always known of a video
        return SourceVideo(found.path, found.name, found.height, found.width, rate, seconds)
    job = services.job_files.find(params.job)
    if services.config.credentials and job.owner != owner:
        raise UserError(f"There is no job {job.id} here. It may have been deleted: look into the history.")
    return _generated_video(services.job_files.finished(job), job.title[:80].strip() or job.id[:8])


def _generated_video(path: Path, title: str) -> SourceVideo:
    """A video that this app generated, read from its header, which is right."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        return SourceVideo(path, f"{title}.mp4", stream.height, stream.width, rate, stream.frames / rate)
