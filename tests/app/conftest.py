"""A pipeline with scripted faults, a worker in a thread, and real servers: fixtures of the app's tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import scripted_pipeline
from waiting import wait_for

from app.api.service import JobService
from app.config import AppConfig
from app.storage.jobs import Job, JobKind
from app.tasks.context import Services
from app.worker.worker import Worker

ME = "me"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of few weights, 32x32 pixels."""
    return scripted_pipeline.save(tmp_path_factory.mktemp("pipelines") / "pipeline")


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function of N that opens the gate before group N + 1 of prompts that say "waits N"."""
    folder = tmp_path / "gates"
    folder.mkdir()
    monkeypatch.setenv(scripted_pipeline.GATE, str(folder))
    return lambda group: (folder / str(group)).touch()


@dataclass
class WorkerHarness:
    """A job service, and workers in threads, on the same data folder."""

    config: AppConfig
    service: JobService
    workers: list[tuple[Worker, threading.Thread]]

    def submit(self, prompt: str = "red", kind: JobKind = JobKind.GENERATE, owner: str = ME, **raw: Any) -> Job:
        settings = {"prompt": prompt, "seconds": 2, "steps": 2, "seed": 7} if kind is JobKind.GENERATE else {}
        return self.service.submit(kind, settings | raw, owner)

    def start_worker(self) -> Worker:
        """Start a worker."""
        from app.inference.model_manager import ModelManager

        services = Services.from_config(self.config)
        worker = Worker(services, lambda: ModelManager(services.store, scripted_pipeline.load))
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        self.workers.append((worker, thread))
        return worker

    def stop_workers(self) -> None:
        """Stop the workers, as a server does."""
        for worker, thread in self.workers:
            worker.quit.set()
            thread.join(60)
            assert not thread.is_alive()
        self.workers.clear()

    def reload(self, job: Job) -> Job:
        return self.service.job_files.find(job.id)

    def wait(self, job: Job) -> Job:
        wait_for(lambda: self.reload(job).state.ended, f"{job.title} ends")
        return self.reload(job)

    def file(self, job: Job, name: str = "final.mp4") -> Path:
        return self.service.job_files.folder(job) / name


@pytest.fixture
def harness(tmp_path: Path, pipeline_folder: Path) -> Iterator[WorkerHarness]:
    config = AppConfig(data_dir=tmp_path / "data", pipeline=pipeline_folder, folders=(tmp_path,),
                       workspace=tmp_path / "work")
    harness = WorkerHarness(config, JobService(Services.from_config(config)), [])
    yield harness
    harness.stop_workers()


@dataclass
class LiveServer:
    url: str
    port: int
    service: JobService
    app: Any
    stop: Callable[[], None]


@pytest.fixture
def start_server(tmp_path: Path, pipeline_folder: Path) -> Iterator[Callable[..., LiveServer]]:
    """Return a function that starts a server on a free loopback port, with a worker process of its own."""
    servers: list[LiveServer] = []

    def start(port: int = 0, **settings: Any) -> LiveServer:
        from app.server import create_app, make_server

        config = {"data_dir": tmp_path / "data", "pipeline": pipeline_folder, "folders": (tmp_path,),
                  "workspace": tmp_path / "work"} | settings  # fmt: skip
        app = create_app(AppConfig(**config), scripted_pipeline.load)
        listener = socket.create_server(("127.0.0.1", port))
        uvicorn_server = make_server(app)
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop() -> None:
            uvicorn_server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"

        wait_for(lambda: uvicorn_server.started or not thread.is_alive(), "the server starts")
        assert uvicorn_server.started
        port = listener.getsockname()[1]
        server = LiveServer(f"http://127.0.0.1:{port}", port, app.state.service, app, stop)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
