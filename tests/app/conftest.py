"""The small engine, a worker in a thread, and real servers: shared by the app's tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_engine
from waiting import wait_for

from app.api.service import JobService
from app.config import AppConfig
from app.storage.jobs import Job, JobKind
from app.tasks.context import Services
from app.worker.worker import Worker

ME = "me"


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_for


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of few weights, 32x32 pixels."""
    return small_engine.save(tmp_path_factory.mktemp("small") / "pipeline")


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Opens the gate before group N + 1 of prompts that say "waits N"."""
    folder = tmp_path / "gates"
    folder.mkdir()
    monkeypatch.setenv(small_engine.GATE, str(folder))
    return lambda group: (folder / str(group)).touch()


@dataclass
class Bench:
    """A door, and workers in threads, on one and the same folder."""

    config: AppConfig
    service: JobService
    workers: list[tuple[Worker, threading.Thread]]

    def submit(self, prompt: str = "red", kind: JobKind = JobKind.GENERATE, owner: str = ME, **raw: Any) -> Job:
        settings = {"prompt": prompt, "seconds": 2, "steps": 2, "seed": 7} if kind is JobKind.GENERATE else {}
        return self.service.submit(kind, settings | raw, owner)

    def work(self) -> Worker:
        """A worker begins."""
        from app.inference.model_manager import ModelManager

        services = Services.from_config(self.config)
        worker = Worker(services, lambda: ModelManager(services.store, small_engine.load))
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        self.workers.append((worker, thread))
        return worker

    def rest(self) -> None:
        """The workers end, as when the server stops."""
        for worker, thread in self.workers:
            worker.quit.set()
            thread.join(60)
            assert not thread.is_alive()
        self.workers.clear()

    def now(self, job: Job) -> Job:
        return self.service.library.find(job.id)

    def ended(self, job: Job) -> Job:
        wait_for(lambda: self.now(job).state.ended, f"{job.title} ends")
        return self.now(job)

    def file(self, job: Job, name: str = "final.mp4") -> Path:
        return self.service.library.folder(job) / name


@pytest.fixture
def bench(tmp_path: Path, small: Path) -> Iterator[Bench]:
    config = AppConfig(data_dir=tmp_path / "data", pipeline=small, folders=(tmp_path,), workspace=tmp_path / "work")
    made = Bench(config, JobService(Services.from_config(config)), [])
    yield made
    made.rest()


@dataclass
class Site:
    url: str
    port: int
    service: JobService
    app: Any
    stop: Callable[[], None]


@pytest.fixture
def start_site(tmp_path: Path, small: Path) -> Iterator[Callable[..., Site]]:
    """Starts real servers on free loopback ports, with workers of their own."""
    sites: list[Site] = []

    def start(port: int = 0, **settings: Any) -> Site:
        from app.server import create_app, make_server

        given = {"data_dir": tmp_path / "data", "pipeline": small, "folders": (tmp_path,),
                 "workspace": tmp_path / "work"} | settings  # fmt: skip
        app = create_app(AppConfig(**given), small_engine.load)
        listener = socket.create_server(("127.0.0.1", port))
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not stop"

        wait_for(lambda: server.started or not thread.is_alive(), "the server starts")
        assert server.started
        port = listener.getsockname()[1]
        site = Site(f"http://127.0.0.1:{port}", port, app.state.service, app, stop)
        sites.append(site)
        return site

    yield start
    for site in sites:
        site.stop()
