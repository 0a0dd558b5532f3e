"""An S3 server on loopback (moto's), which can be made to fail; a missing moto skips a test, or fails it if
ODVAE_REQUIRE_ALL is set."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

needs_s3 = pytest.mark.skipif(
    not all(map(find_spec, ("moto", "s3fs", "flask_cors"))) and not os.environ.get("ODVAE_REQUIRE_ALL"),
    reason="needs moto, s3fs, flask and flask-cors")


class S3Server:
    """A server at `url`, with an empty bucket named bucket.

    Attributes:
        fail: a test of each request's method and path; where it is true the answer is 500.
        requests: method and path of each.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.fail: Callable[[str, str], bool] = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fail(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"]
        found: Iterable[bytes] = self._application(environ, start_response)
        return found

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Run a server that fsspec's s3:// goes to, in this process and its children."""
    import fsspec

    server = S3Server()
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden",
                        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    try:
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield server
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
