"""The HTTP API and the files: plain requests, with what a `JobService` allows.

    POST   /api/jobs                {"kind": "generate", "prompt": "...", ...} -> 202 and the job
    GET    /api/jobs                ?kind=&state=&search=&limit=&offset=
    GET    /api/jobs/ID             how far it is, what came out, which files can be fetched
    GET    /api/jobs/ID/events      the same, as server-sent events until it ends
    PUT    /api/jobs/ID             other settings for a job that waits
    POST   /api/jobs/ID/ACTION      pause, stop, cancel, resume, duplicate, earlier, later, first,
                                    favorite, unfavorite, delete
    DELETE /api/jobs/ID
    GET    /api/queue
    GET    /api/server              whether the worker is ready, what the model makes, the limits
    POST   /api/uploads?name=FILE   the file's bytes as the body -> an id, for `upload` of a job
    GET    /api/places?kind=        folders that can be picked: videos, cache, pipeline, vae, run
    GET    /media/ID/NAME           a file of a job

Errors are {"error": text}: 400 for what is wrong with a request, 404 for what is not there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any, cast, get_args

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.api.auth import ANONYMOUS, OWNER
from app.api.service import JobService
from app.inference.fragmented_mp4 import concat_fragments
from app.storage.assets import AssetKind as PlaceKind
from app.storage.job_files import PUBLIC_FILES
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.generate import pipeline_folder
from app.tasks.pipeline_spec import load_pipeline_spec
from odvae.utils.errors import UserError

MOST = 2**18  # bytes of a request's JSON
LOOK = 0.25  # seconds between two looks at a job that is followed
LISTED = 500  # jobs of one answer

def serialize_job(service: JobService, job: Job) -> dict[str, Any]:
    """A job, with the files that can be fetched of it."""
    names = [name for name in PUBLIC_FILES if service.library.public_file(job, name) is not None]
    return job.summary() | {"files": {name: f"/media/{job.id}/{name}" for name in names}}


def make_router(service: JobService) -> APIRouter:
    router = APIRouter()

    def who(request: Request) -> str:
        return str(request.scope.get(OWNER, ANONYMOUS))

    async def ask(work: Callable[[], Any], missing: int = 400, status: int = 200) -> Response:
        """The answer of work that is done in another thread; a user's mistake is told with `missing`."""
        try:
            return JSONResponse(await run_in_threadpool(work), status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, missing)

    def find(job_id: str, owner: str) -> Job:
        try:
            return service.find(job_id, owner)
        except UserError as error:
            raise HTTPException(404, str(error)) from error

    @router.post("/api/jobs")
    async def submit(request: Request) -> Response:
        raw = await _json(request)
        kind = raw.pop("kind", JobKind.GENERATE)
        if kind not in [*JobKind]:
            return JSONResponse({"error": f"kind: must be one of {', '.join(JobKind)}."}, 400)
        return await ask(lambda: serialize_job(service, service.submit(JobKind(kind), raw, who(request))), status=202)

    @router.get("/api/jobs")
    async def listed(request: Request, kind: str = "", state: str = "", search: str = "", favorites: bool = False,
                     limit: int = 60, offset: int = 0) -> Response:
        if (kind and kind not in [*JobKind]) or (state and state not in [*JobState]):
            return JSONResponse({"error": f"kind is one of {', '.join(JobKind)}, state of {', '.join(JobState)}."}, 400)
        if not (0 <= limit <= LISTED and 0 <= offset < 2**31 and len(search) <= 1000):
            return JSONResponse({"error": f"limit: 0 to {LISTED}; offset: from 0; search: 1000 characters."}, 400)
        return await ask(
            lambda: [
                serialize_job(service, job)
                for job in service.history(
                    who(request),
                    kinds=[JobKind(kind)] if kind else (),
                    states=[JobState(state)] if state else (),
                    search=search,
                    favorites=favorites,
                    limit=limit,
                    offset=offset,
                )
            ]
        )

    @router.get("/api/queue")
    async def queue(request: Request) -> Response:
        return await ask(
            lambda: [serialize_job(service, job) | {"before": before} for before, job in service.queue(who(request))]
        )

    @router.get("/api/server")
    async def server(request: Request) -> Response:
        """Whether the worker is ready, what the model makes, and what may be asked for."""
        config = service.config
        return await ask(lambda: {
            "worker": service.store.get_value("worker") or {"state": "starting"},
            "model": asdict(load_pipeline_spec(pipeline_folder("", service.services))),
            "limits": {"seconds": config.max_seconds, "side": config.max_side, "queued": config.max_queued,
                       "upload_bytes": config.max_upload, "upload_seconds": config.max_upload_seconds}})

    @router.get("/api/places")
    async def places(request: Request, kind: str = "pipeline") -> Response:
        if kind not in get_args(PlaceKind):
            return JSONResponse({"error": f"kind: must be one of {', '.join(get_args(PlaceKind))}."}, 400)
        return await ask(lambda: [{"id": one.id, "kind": one.kind, "name": one.name, "detail": one.detail}
                                  for one in service.services.places.list(cast(PlaceKind, kind))])

    @router.post("/api/uploads")
    async def upload(request: Request, name: str = "upload") -> Response:
        try:
            made = await service.services.uploads.receive_async(request.stream(), name, who(request))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse({key: value for key, value in asdict(made).items() if key not in ("path", "owner")}, 201)

    @router.get("/api/jobs/{job_id}")
    async def one(request: Request, job_id: str) -> Response:
        return await ask(lambda: serialize_job(service, service.find(job_id, who(request))), missing=404)

    @router.put("/api/jobs/{job_id}")
    async def edit(request: Request, job_id: str) -> Response:
        raw = await _json(request)
        job = await run_in_threadpool(find, job_id, who(request))
        return await ask(lambda: serialize_job(service, service.edit(job.id, raw, who(request))))

    @router.delete("/api/jobs/{job_id}")
    async def delete(request: Request, job_id: str) -> Response:
        job = await run_in_threadpool(find, job_id, who(request))
        return await ask(lambda: service.delete(job.id, who(request)))

    @router.post("/api/jobs/{job_id}/{action}")
    async def act(request: Request, job_id: str, action: str) -> Response:
        job = await run_in_threadpool(find, job_id, who(request))
        return await ask(lambda: serialize_job(service, service.act(job.id, action, who(request))))

    @router.get("/api/jobs/{job_id}/events")
    async def events(request: Request, job_id: str) -> Response:
        job = await run_in_threadpool(find, job_id, who(request))

        async def follow() -> AsyncIterator[str]:
            before = ""
            while not await request.is_disconnected():
                try:
                    now = await run_in_threadpool(service.find, job.id, who(request))
                except UserError:
                    return  # it was deleted
                text = json.dumps(await run_in_threadpool(serialize_job, service, now))
                if text != before:
                    before = text
                    yield f"data: {text}\n\n"
                if now.state.ended:
                    return
                await asyncio.sleep(LOOK)

        return StreamingResponse(follow(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @router.get("/media/{job_id}/growing.mp4")
    async def growing(request: Request, job_id: str) -> Response:
        """The video as far as it is, for browsers that cannot take it in pieces."""
        job = await run_in_threadpool(find, job_id, who(request))
        if service.library.chunk(job, 0) is None:
            raise HTTPException(404)
        return StreamingResponse(concat_fragments(service.library.folder(job)), media_type="video/mp4",
                                 headers={"Cache-Control": "no-store"})

    @router.get("/media/{job_id}/chunks/{number}")
    async def chunk(request: Request, job_id: str, number: str) -> Response:
        job = await run_in_threadpool(find, job_id, who(request))
        digits = number.isascii() and number.isdigit() and len(number) <= 6
        path = service.library.chunk(job, int(number)) if digits else None
        if path is None:
            raise HTTPException(404)
        try:  # whole, as the folder may go at any moment
            return Response(await run_in_threadpool(path.read_bytes), media_type="video/mp4",
                            headers={"Cache-Control": "private, max-age=3600"})
        except OSError as error:
            raise HTTPException(404) from error

    @router.get("/media/{job_id}/{name}")
    async def media(request: Request, job_id: str, name: str) -> Response:
        """The id is looked up, the name is one of a few; no path comes from outside."""
        job = await run_in_threadpool(find, job_id, who(request))
        found = service.library.public_file(job, name)
        if found is None:
            raise HTTPException(404)
        path, kind = found
        if job.state.ended:
            return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})
        try:  # it may be replaced at any moment: one version, whole
            return Response(await run_in_threadpool(path.read_bytes), media_type=kind,
                            headers={"Cache-Control": "no-store"})
        except OSError as error:
            raise HTTPException(404) from error

    return router


async def _json(request: Request) -> dict[str, Any]:
    """The request's body, an object. Other sites' forms cannot send the type that is asked for."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send JSON, with Content-Type: application/json.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST:
            raise HTTPException(413, f"At most {MOST} bytes.")
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"That is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise HTTPException(400, "Send an object: {\"kind\": \"generate\", ...}.")
    return raw


async def http_error_handler(_: Request, error: Exception) -> Response:
    """Every error in the same form."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


