"""A server with the scripted pipeline in a process of its own: python server_process.py DATA PIPELINE PORT MAX_DISK."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class ServerProcess:
    """The server process and its worker, controlled from outside."""

    def __init__(self, data: Path, pipeline: Path, max_disk: int = 20 * 2**30) -> None:
        import httpx

        self.data, self._get = data, httpx.get
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
        self.log = data.with_suffix(".log")
        with self.log.open("ab") as log:
            command = [sys.executable, __file__, *map(str, (data, pipeline, self.port, max_disk))]
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        self.url = f"http://127.0.0.1:{self.port}"
        from waiting import wait_for

        wait_for(self._answers, "the server answers")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with suppress(OSError, ConnectionError), socket.create_connection(("127.0.0.1", self.port), 1):
            return bool(self._get(self.url + "/api/queue").status_code == 200)
        return False

    def worker(self, number: int = 0) -> Any:
        """Return the psutil.Process of a worker, if it is registered and alive."""
        import psutil

        from app.storage.store import JobStore

        pids = {status["number"]: status.get("pid", 0) for status in JobStore(self.data / "jobs.sqlite3").workers()}
        with suppress(psutil.Error):
            process = psutil.Process(pids.get(number, 0))
            return process if self.process.pid in [parent.pid for parent in process.parents()] else None
        return None

    def process_memory(self) -> int:
        """Return the resident bytes of the server's own process."""
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)

    def kill(self, victim: str) -> None:
        import psutil
        from waiting import has_ended, wait_for

        worker = self.worker()
        if victim in ("worker", "both") and worker is not None:
            with suppress(psutil.Error):
                worker.kill()
        if victim in ("server", "both"):
            self.process.kill()
            self.process.wait()
            if worker is not None:  # it exits when the pipe to its server closes
                wait_for(lambda: has_ended(worker), "the worker exits")

    def stop(self) -> None:
        if self.process.poll() is None:
            from waiting import TIMEOUT

            self.process.send_signal(signal.SIGINT)
            self.process.wait(TIMEOUT)


def load(folder: Path | None) -> Any:
    """Load the scripted pipeline, in the worker: the server itself imports no torch."""
    import scripted_pipeline

    return scripted_pipeline.load(folder)


def main() -> None:
    import server_process  # by this name the worker finds `load`

    from app.config import AppConfig
    from app.server import serve
    from odvae.utils.progress import setup_logging

    setup_logging()
    data, pipeline, port, max_disk = sys.argv[1:]
    config = AppConfig(data_dir=Path(data), pipeline=Path(pipeline), port=int(port), max_disk=int(max_disk),
                       folders=(Path(data).parent,), max_queued=500)
    serve(config, server_process.load)


if __name__ == "__main__":
    main()
