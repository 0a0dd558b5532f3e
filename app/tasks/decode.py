"""Decode the latents of a generated video again, e.g. in other tiles, without sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.storage.jobs import JobKind
from app.tasks.context import JobContext, Services
from app.tasks.validation import ID, checked
from odvae.utils.errors import UserError


class DecodeParams(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    job: ID  # the one with the latents
    tile: Annotated[int, Field(ge=64, le=4096)] | None = None  # pixels a side; None: chosen to fit the memory


def validate(raw: Mapping[str, Any], services: Services, owner: str) -> tuple[dict[str, Any], str]:
    params = checked(DecodeParams, raw)
    parent = services.job_files.find(params.job)
    if (services.config.credentials and parent.owner != owner) or parent.kind is not JobKind.GENERATE:
        raise UserError(f"There is no video {params.job} here.")
    services.job_files.finished_file(parent, "final.safetensors")
    return params.model_dump(mode="json"), parent.title


def run(context: JobContext) -> None:
    from app.tasks.generate_worker import decode_again  # torch and diffusers take seconds to import

    params = DecodeParams.model_validate(context.job.params)
    parent = context.services.job_files.find(params.job)
    latents = context.services.job_files.finished_file(parent, "final.safetensors")
    decode_again(context, latents, parent.params["pipeline"], params.tile)
