"""The API for gradio_client, and for language models by MCP: a `JobService` by named endpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import gradio as gr

from app.api.schemas import AssetInfo, JobInfo
from app.storage.asset_scanner import ASSET_LABELS, AssetKind
from app.storage.jobs import Job, JobKind, JobState
from app.ui.page import Page, owner_of
from odvae.utils.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def build(page: Page) -> None:
    """Add the named endpoints."""
    endpoints = Endpoints(page)
    for name in ("generate", "submit", "status", "control", "result", "jobs", "assets"):
        gr.api(_with_gradio_errors(getattr(endpoints, name)), api_name=name, concurrency_limit=None)


def _with_gradio_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a UserError into a gr.Error with its text for the client."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapper


class Endpoints:
    def __init__(self, page: Page) -> None:
        self.service = page.service

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        seed: int = -1,
        seconds: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        loras: list[dict[str, Any]] | None = None,
        pipeline: str = "",
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> str:
        """Queue a video and return its job id at once.

        Args:
            prompt: what the video shows.
            negative_prompt: what to avoid.
            seed: -1 draws one, which /status returns.
            seconds: length of the video; by default the pipeline's.
            num_inference_steps: sampling steps of each group of latents; by default the pipeline's.
            guidance_scale: how closely the prompt is followed; 1: no guidance; by default the pipeline's.
            loras: adapters, each {"id": ..., "weight": 1.0}; the ids are those of /assets.
            pipeline: the id of one of /assets; by default that of the settings.
        """
        raw = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "seconds": seconds,
               "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
               "loras": loras or [], "pipeline": pipeline}
        return self.service.submit(JobKind.GENERATE, raw, owner_of(request)).id

    def submit(self, kind: str, settings: dict[str, Any], request: gr.Request = None) -> str:  # type: ignore[assignment]
        """Queue a job of any kind and return its id.

        Args:
            kind: generate, decode, compress, cache or train.
            settings: as for POST /api/jobs.
        """
        if kind not in [*JobKind]:
            raise UserError(f"kind: must be one of {', '.join(JobKind)}.")
        if not isinstance(settings, dict):
            raise UserError("settings: must be an object.")
        return self.service.submit(JobKind(kind), settings, owner_of(request)).id

    def status(self, job_id: str, request: gr.Request = None) -> dict[str, Any]:  # type: ignore[assignment]
        """Return state, settings, progress, files and errors of a job.

        Args:
            job_id: as returned when it was queued.
        """
        return self._describe(self.service.find(job_id, owner_of(request)))

    def control(self, job_id: str, action: str, request: gr.Request = None) -> dict[str, Any]:  # type: ignore[assignment]
        """Act on a job and return it.

        Args:
            job_id: the job.
            action: pause, stop (keeps the finished part), cancel, resume, duplicate, earlier, later, first, favorite,
                unfavorite or delete.
        """
        return self._describe(self.service.act(job_id, action, owner_of(request)))

    def result(self, job_id: str, request: gr.Request = None) -> dict[str, Any]:  # type: ignore[assignment]
        """Return the MP4 of a job that has ended (downloaded by gradio_client).

        Args:
            job_id: the job.
        """
        job = self.service.find(job_id, owner_of(request))
        name = "reconstruction.mp4" if job.kind is JobKind.COMPRESS else "final.mp4"
        path = self.service.job_files.finished_file(job, name)
        return gr.FileData(path=str(path), mime_type="video/mp4").model_dump()

    def jobs(self, search: str = "", state: str = "", request: gr.Request = None) -> list[dict[str, Any]]:  # type: ignore[assignment]
        """List the newest 60 jobs.

        Args:
            search: words in their prompts or settings.
            state: queued, running, paused, done, stopped, cancelled or failed; empty: any.
        """
        if state and state not in [*JobState]:
            raise UserError(f"state: must be one of {', '.join(JobState)}.")
        states = [JobState(state)] if state else ()
        jobs = self.service.history(owner_of(request), search=str(search)[:1000], states=states)
        return [self._describe(job) for job in jobs]

    def assets(self, kind: str = "lora", request: gr.Request = None) -> list[dict[str, Any]]:  # type: ignore[assignment]
        """List what a job's settings may name by id.

        Args:
            kind: pipeline, lora, vae, videos, cache or run.
        """
        if kind not in ASSET_LABELS:
            raise UserError(f"kind: must be one of {', '.join(ASSET_LABELS)}.")
        assets = self.service.services.assets.list(cast(AssetKind, kind))
        return [AssetInfo.model_validate(asset).model_dump(mode="json") for asset in assets]

    def _describe(self, job: Job) -> dict[str, Any]:
        return JobInfo.of(job, self.service).model_dump(mode="json")
