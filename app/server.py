"""The web server: authentication, the API and the files, and the Gradio page mounted at /."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from app.api.auth import AuthMiddleware
from app.api.routes import http_error_handler, router
from app.api.service import JobService
from app.config import AppConfig
from app.storage.job_files import lock
from app.tasks.context import Services
from app.tasks.pipeline_spec import load_pipeline_spec
from app.worker.supervisor import Supervisor
from odvae.utils.errors import UserError

logger = logging.getLogger(__name__)

UPLOAD_LIFETIME = 14 * 24 * 3600  # seconds


def create_app(config: AppConfig, load: Any = None) -> FastAPI:
    """Build the app; its lifespan stops the worker processes. `load`: a model loader for tests, see `Supervisor`."""
    folder = config.data_dir.absolute()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # both are read by gradio, at its import or later
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")  # uploads, until they are probed
    services = Services.from_config(config)
    data_lock = lock(folder / ".lock")
    supervisor = Supervisor(config, services.store, load)
    supervisor.start()  # its processes import torch while this one imports gradio
    try:
        from app.ui import mount

        service = JobService(services)
        services.uploads.remove_orphans(UPLOAD_LIFETIME)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            supervisor.stop()
            if data_lock is not None:
                data_lock.release()

        app = FastAPI(lifespan=lifespan, title="Long Video Diffusion", docs_url=None, redoc_url=None)
        app.state.service, app.state.supervisor = service, supervisor
        app.add_middleware(AuthMiddleware, credentials=config.credentials)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=config.hosts)
        for error in HTTPException, RequestValidationError, UserError:
            app.add_exception_handler(error, http_error_handler)
        app.include_router(router)
        mount(app, service)
    except BaseException:
        supervisor.stop()
        if data_lock is not None:
            data_lock.release()
        raise
    return app


def serve(config: AppConfig, load: Any = None) -> None:
    """Listen and serve until Ctrl-C. Raises UserError for an address in use, or an invalid pipeline."""
    start = time.monotonic()
    config.check_exposure()
    load_pipeline_spec(config.pipeline)
    if config.mcp and importlib.util.find_spec("mcp") is None:
        raise UserError("mcp: the package is not installed: pip install '.[mcp]', or omit --mcp.")
    listener = _listen(config.host, config.port)
    server = make_server(create_app(config, load))
    logger.info("serving at http://%s:%d after %.1f s; press Ctrl-C to stop", *listener.getsockname()[:2],
                time.monotonic() - start)
    with suppress(KeyboardInterrupt):  # uvicorn has shut down cleanly and raises it again
        server.run(sockets=[listener])


def make_server(app: FastAPI) -> uvicorn.Server:
    """Return the HTTP server of an app, not yet started."""
    logging.getLogger("uvicorn.error").addFilter(_keep_log_record)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, server_header=False))


def _keep_log_record(record: logging.LogRecord) -> bool:
    """Drop records of connections that are cancelled at shutdown: an open page holds one forever."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and "timeout graceful shutdown exceeded" not in record.getMessage()


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = "it is already in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"Cannot listen on {host}:{port}: {reason}. Choose another --port.") from error
    return listener
