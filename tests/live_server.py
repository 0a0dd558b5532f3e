"""A server in a thread, with the scripted pipeline in a worker process."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import scripted_pipeline
from waiting import TIMEOUT, wait_for

from app.config import AppConfig


class LiveServer:
    """A server on a loopback port (0: a free one), with its data in `folder`."""

    def __init__(self, folder: Path, pipeline: Path, port: int = 0, **settings: Any) -> None:
        from app.server import create_app, make_server

        config = {"data_dir": folder / "data", "pipeline": pipeline, "folders": (folder,),
                  "workspace": folder / "work"} | settings  # fmt: skip
        app = create_app(AppConfig(**config), scripted_pipeline.load)
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.service = app.state.service
        self._server = make_server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started or not self._thread.is_alive(), "the server starts")
        assert self._server.started

    def stop(self) -> None:
        """Stop the server and its worker. May be called twice."""
        self._server.should_exit = True
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the server did not stop"
