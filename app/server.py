"""The web server: FastAPI with the guard in front, the videos by id, and the Gradio page mounted at /."""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.config import AppConfig
from app.engine import Engine, load_pipeline
from app.library import Library
from app.worker import Worker
from odvae.runtime.errors import UserError

logger = logging.getLogger(__name__)

# The page may talk to this server and to nobody else; 'unsafe-eval' is needed by gr.HTML's templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class Guard:
    """Asks for the password (everywhere: page, API and videos), refuses writes from other sites, sets safe headers."""

    def __init__(self, app: ASGIApp, credentials: tuple[str, str] | None):
        self.app = app
        self._expected = base64.b64encode(":".join(credentials).encode()).decode() if credentials else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refuse(scope["type"], scope.get("method", ""), Headers(scope=scope))

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        await (refusal or self.app)(scope, receive, send_safely)

    def _refuse(self, kind: str, method: str, headers: Headers) -> Response | None:
        if kind != "http":
            return Response(status_code=403)  # nothing here speaks WebSocket
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._expected is not None and not (
            scheme.lower() == "basic" and secrets.compare_digest(given.strip().encode(), self._expected.encode())
        ):
            challenge = {"WWW-Authenticate": 'Basic realm="lvdm-app", charset="UTF-8"'}
            return Response("A password is needed.", 401, challenge)
        origin = headers.get("origin")
        if method not in ("GET", "HEAD", "OPTIONS") and origin and urlsplit(origin).netloc != headers.get("host"):
            return Response("Requests from other sites are refused.", 403)
        return None


def create_app(config: AppConfig, load: Callable[[], Any] | None = None) -> FastAPI:
    """The whole app; its lifespan starts and stops the worker. `load` stands in for the model in tests."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from app.ui import mount

    library = Library(config.data_dir.absolute())
    engine = Engine(load or partial(load_pipeline, config.pipeline))
    worker = Worker(library, engine, config.max_seconds, config.max_queued)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()
            library.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, credentials=config.credentials)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=config.hosts)

    @app.get("/media/{job_id}/{name}")
    def media(job_id: str, name: str) -> Response:
        """A job's video or poster: the id is looked up, the name is one of two; no path comes from outside."""
        job = library.store.get(job_id)
        files = {"video.mp4": (library.video, "video/mp4"), "poster.webp": (library.poster, "image/webp")}
        if job is None or name not in files or not (path := files[name][0](job)).is_file():
            raise HTTPException(404)
        kind = files[name][1]
        if job.state.active:  # it may be replaced by a longer one at any moment: send one version, whole
            return Response(path.read_bytes(), media_type=kind, headers={"Cache-Control": "no-store"})
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})

    mount(app, worker)
    return app


def serve(config: AppConfig) -> None:
    """Listen and serve until Ctrl-C. Raises UserError where the address cannot be had."""
    config.check_exposure()
    listener = _listen(config.host, config.port)
    server = make_server(create_app(config))
    logger.info("the app is at http://%s:%d (Ctrl-C ends it)", *listener.getsockname()[:2])
    with suppress(KeyboardInterrupt):  # the usual end; uvicorn has shut down in order and passes it on
        server.run(sockets=[listener])


def make_server(app: FastAPI) -> uvicorn.Server:
    """The HTTP server of an app, not started yet."""
    logging.getLogger("uvicorn.error").addFilter(_not_at_the_end)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False))


def _not_at_the_end(record: logging.LogRecord) -> bool:
    """An open page holds a connection for ever; that it is cut when the server ends is no news."""
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and "timeout graceful shutdown exceeded" not in record.getMessage()


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = "it is in use already" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"Cannot listen on {host}:{port}: {reason}. Choose another --port.") from error
    return listener
