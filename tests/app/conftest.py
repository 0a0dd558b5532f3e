"""A pipeline with scripted faults, a worker in a thread, and real servers: fixtures of the app's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_pipeline
from live_server import LiveServer
from worker_harness import WorkerHarness


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


@pytest.fixture
def harness(tmp_path: Path, pipeline_folder: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(tmp_path, pipeline_folder)
    yield harness
    harness.stop_workers()


@pytest.fixture
def start_server(tmp_path: Path, pipeline_folder: Path) -> Iterator[Callable[..., LiveServer]]:
    """Return a function that starts a server on a free loopback port, with a worker process of its own."""
    servers: list[LiveServer] = []

    def start(port: int = 0, **settings: Any) -> LiveServer:
        servers.append(LiveServer(tmp_path, pipeline_folder, port, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the gates for the workers of a module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("gates")
        patch.setenv(scripted_pipeline.GATE, str(folder))
        yield folder


@pytest.fixture(scope="module")
def server(gates: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for the tests of a module, as a start takes seconds. Its gates are those of `gates`."""
    server = LiveServer(tmp_path_factory.mktemp("server"), pipeline_folder)
    yield server
    server.stop()
