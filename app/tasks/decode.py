"""Decode the latents of a video that was made once more, e.g. in other tiles: nothing is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.checks import ID, checked
from app.desk import JobContext, Services
from app.jobs import JobKind
from odvae.runtime.errors import UserError


class DecodeParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ID  # the one that made the latents
    tile: Annotated[int, Field(ge=64, le=4096)] | None = None  # pixels a side; None: as fits the memory


def validate(raw: Mapping[str, Any], rooms: Services, owner: str) -> tuple[dict[str, Any], str]:
    params = checked(DecodeParams, raw)
    parent = rooms.library.find(params.job)
    if (rooms.config.credentials and parent.owner != owner) or parent.kind is not JobKind.GENERATE:
        raise UserError(f"There is no video {params.job} here.")
    rooms.library.finished(parent, "final.safetensors")
    return params.model_dump(mode="json"), parent.title


def run(desk: JobContext) -> None:
    from app.making import decode_again  # torch and diffusers take seconds to import

    params = DecodeParams.model_validate(desk.job.params)
    parent = desk.rooms.library.find(params.job)
    latents = desk.rooms.library.finished(parent, "final.safetensors")
    decode_again(desk, latents, parent.params["pipeline"], params.tile)
