"""The HTTP API and the files: plain requests to a `JobService`. /docs describes them all.

Errors are {"error": text}: 400 for an invalid request, 404 for what does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from app.api.auth import ANONYMOUS, OWNER
from app.api.schemas import (
    AssetInfo,
    ErrorInfo,
    JobInfo,
    JobRequest,
    Limits,
    ModelInfo,
    QueuedJob,
    ServerInfo,
    UploadInfo,
    WorkerInfo,
)
from app.api.service import JobAction, JobService
from app.inference.fragmented_mp4 import concat_fragments
from app.storage.asset_scanner import AssetKind
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from app.tasks.validation import explain
from odvae.utils.errors import UserError

MAX_BODY = 2**18  # bytes of a request's JSON
POLL_SECONDS = 0.25  # between two polls of a followed job
MAX_LISTED = 500  # jobs in one response
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JSONRoute(APIRoute):
    """Accepts bodies of at most `MAX_BODY` bytes, and only as JSON, which forms of other sites cannot send."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def limited(request: Request) -> Response:
            if self.body_field is None:
                return await handle(request)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"The body must have at most {MAX_BODY} bytes.")

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            return await handle(Request(request.scope, receive))

        return limited


router = APIRouter(route_class=JSONRoute, responses={"4XX": {"model": ErrorInfo}})


async def get_service(request: Request) -> JobService:
    """Return the app's service."""
    return request.app.state.service


async def get_owner(request: Request) -> str:
    """Return the owner that `AuthMiddleware` found."""
    return str(request.scope.get(OWNER, ANONYMOUS))


Service = Annotated[JobService, Depends(get_service)]
Owner = Annotated[str, Depends(get_owner)]


def get_job(job_id: str, service: Service, owner: Owner) -> Job:
    """Return the owner's job, or answer 404."""
    try:
        return service.find(job_id, owner)
    except UserError as error:
        raise HTTPException(404, str(error)) from error


FoundJob = Annotated[Job, Depends(get_job)]


@router.post("/api/jobs", status_code=202)
def submit(request: JobRequest, service: Service, owner: Owner) -> JobInfo:
    """Queue a job: its kind and its settings."""
    return JobInfo.of(service.submit(request.kind, request.model_extra or {}, owner), service)


@router.get("/api/jobs")
def list_jobs(service: Service, owner: Owner, kind: JobKind | Literal[""] = "", state: JobState | Literal[""] = "",
              search: Annotated[str, Query(max_length=1000)] = "", favorites: bool = False,
              limit: Annotated[int, Query(ge=0, le=MAX_LISTED)] = 60,
              offset: Annotated[int, Query(ge=0, lt=2**31)] = 0) -> list[JobInfo]:  # fmt: skip
    """List the history, newest first. `search`: words of the titles and the settings."""
    jobs = service.history(owner, kinds=[kind] if kind else (), states=[state] if state else (), search=search,
                           favorites=favorites, limit=limit, offset=offset)  # fmt: skip
    return [JobInfo.of(job, service) for job in jobs]


@router.get("/api/queue")
def list_queue(service: Service, owner: Owner) -> list[QueuedJob]:
    """List what is queued, in order."""
    return [QueuedJob(**dict(JobInfo.of(job, service)), before=before) for before, job in service.queue(owner)]


@router.get("/api/server")
def describe_server(service: Service) -> ServerInfo:
    """Return whether the workers are ready, what the models generate, and the limits."""
    config, spec = service.config, load_pipeline_spec(pipeline_folder("", service.services))
    models = []
    for asset in service.services.assets.list("pipeline"):
        with suppress(UserError):  # it is damaged, or has just been removed
            model = ModelInfo.model_validate(load_pipeline_spec(asset.path))
            models.append(model.model_copy(update={"pipeline": asset.id}))
    limits = Limits(seconds=config.max_seconds, side=config.max_side, queued=config.max_queued,
                    upload_bytes=config.max_upload, upload_seconds=config.max_upload_seconds)  # fmt: skip
    return ServerInfo(workers=[WorkerInfo(**status) for status in service.store.workers()],
                      model=ModelInfo.model_validate(spec), models=models, limits=limits)  # fmt: skip


@router.get("/api/assets")
def list_assets(service: Service, kind: AssetKind = "pipeline") -> list[AssetInfo]:
    """List the assets of a kind that can be picked."""
    return [AssetInfo.model_validate(asset) for asset in service.services.assets.list(kind)]


@router.post("/api/uploads", status_code=201)
async def upload(request: Request, service: Service, owner: Owner, name: str = "upload") -> UploadInfo:
    """Upload a picture or a video: the file's bytes are the body. Its id is for `upload` of a job."""
    return UploadInfo.model_validate(await service.services.uploads.receive_async(request.stream(), name, owner))


@router.get("/api/jobs/{job_id}")
def describe_job(job: FoundJob, service: Service) -> JobInfo:
    """Return the progress, the result and the files of a job."""
    return JobInfo.of(job, service)


@router.put("/api/jobs/{job_id}")
def edit(job: FoundJob, settings: Annotated[dict[str, Any], Body()], service: Service, owner: Owner) -> JobInfo:
    """Give a queued job other settings."""
    return JobInfo.of(service.edit(job.id, settings, owner), service)


@router.delete("/api/jobs/{job_id}")
def delete(job: FoundJob, service: Service, owner: Owner) -> None:
    """Remove a job with its files; not while it runs."""
    service.act(job.id, JobAction.DELETE, owner)


@router.post("/api/jobs/{job_id}/{action}")
def act(job: FoundJob, action: JobAction, service: Service, owner: Owner) -> JobInfo:
    """Act on a job. Return it as it is then; for `duplicate`, the new one."""
    return JobInfo.of(service.act(job.id, action, owner), service)


@router.get("/api/jobs/{job_id}/events", response_class=StreamingResponse)
async def follow(request: Request, job: FoundJob, service: Service, owner: Owner) -> Response:
    """Send the job as server-sent events, whenever it changes, until it ends."""

    async def events() -> AsyncIterator[str]:
        sent = ""
        while not await request.is_disconnected():
            try:
                current = await run_in_threadpool(service.find, job.id, owner)
            except UserError:
                return  # it was deleted
            text = (await run_in_threadpool(JobInfo.of, current, service)).model_dump_json()
            if text != sent:
                sent = text
                yield f"data: {text}\n\n"
            if current.state.ended:
                return
            await asyncio.sleep(POLL_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/media/{job_id}/growing.mp4", response_class=StreamingResponse)
def growing(job: FoundJob, service: Service) -> Response:
    """Send the video so far, for browsers that cannot play chunks."""
    if service.job_files.chunk(job, 0) is None:
        raise HTTPException(404)
    return StreamingResponse(concat_fragments(service.job_files.folder(job)), media_type="video/mp4",
                             headers={"Cache-Control": "no-store"})


@router.get("/media/{job_id}/chunks/{number}", response_class=Response)
def chunk(job: FoundJob, number: str, service: Service) -> Response:
    """Send a chunk of a growing video."""
    digits = number.isascii() and number.isdigit() and len(number) <= 6
    path = service.job_files.chunk(job, int(number)) if digits else None
    if path is None:
        raise HTTPException(404)
    return _send_whole(path, "video/mp4", "private, max-age=3600")


@router.get("/media/{job_id}/{name}", response_class=FileResponse)
def media(job: FoundJob, name: str, service: Service) -> Response:
    """Send a public file of a job. No path comes from the client."""
    public = service.job_files.public_file(job, name)
    if public is None:
        raise HTTPException(404)
    path, media_type = public
    if job.state.ended:
        return FileResponse(path, media_type=media_type, headers={"Cache-Control": "no-cache"})
    return _send_whole(path, media_type, "no-store")


def _send_whole(path: FilePath, media_type: str, caching: str) -> Response:
    """Send a file that may be replaced or removed at any moment."""
    try:
        return Response(path.read_bytes(), media_type=media_type, headers={"Cache-Control": caching})
    except OSError as error:
        raise HTTPException(404) from error


async def http_error_handler(_: Request, error: Exception) -> Response:
    """Answer every error in the same form."""
    match error:
        case HTTPException():
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        case RequestValidationError():
            items = [{**item, "loc": item["loc"][1:]} for item in error.errors()[:8]]  # without "body" or "query"
            return JSONResponse({"error": " ".join(dict.fromkeys(map(explain, items)))}, 400)
    return JSONResponse({"error": str(error)}, 400)
