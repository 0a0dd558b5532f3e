"""A worker of the app that only writes which device it sees, for `app.worker.supervisor`."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from app.config import AppConfig
from app.worker.devices import VISIBLE
from odvae.utils.files import write_text


def write(config: AppConfig, load: Any, connection: Any, number: int, count: int) -> None:
    """Write the device and the process ID to DATA/NUMBER.json, and wait for the end of the server."""
    write_text(config.data_dir / f"{number}.json", json.dumps([os.environ[VISIBLE], os.getpid()]))
    with suppress(EOFError, OSError):
        connection.recv()
