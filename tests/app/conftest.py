"""A stand-in for the model, a running worker, a running server: shared by the app's tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.config import AppConfig
from app.engine import Engine
from app.library import Library
from app.worker import Worker
from lvdm.pipeline import VideoPiece
from lvdm.rollout import RolloutStep

SIZE, STRIDE, GROUP = 32, 4, 2


class FakePipeline:
    """Makes moving coloured squares, at the pace that the test sets, with the events of the real pipeline.

    `allow` lets the next groups through; a group waits at its last step until then. `fails` maps prompts to errors.
    """

    def __init__(self, paced: bool = False):
        self.vae = SimpleNamespace(temporal_compression_ratio=STRIDE)
        self.transformer = SimpleNamespace(config=SimpleNamespace(frame_rate=8.0))
        self.fails: dict[str, Exception] = {}
        self.asked: list[dict[str, Any]] = []
        self._paced = paced
        self._allowed = threading.Semaphore(0)

    def allow(self, groups: int) -> None:
        self._allowed.release(groups)

    def stream(self, prompt: str, *, frames: int, steps: int, seed: int, **others: Any) -> Iterator[Any]:
        self.asked.append({"prompt": prompt, "frames": frames, "steps": steps, "seed": seed, **others})
        sizes = [1] + [min(GROUP, left) for left in range((frames - 1) // STRIDE, 0, -GROUP)]
        time_now = 0
        for group, size in enumerate(sizes, start=1):
            for step in range(1, steps + 1):
                while self._paced and step == steps and not self._allowed.acquire(timeout=0.05):
                    yield RolloutStep(group, len(sizes), step - 1, steps)  # still at it: lets a cancel through
                yield RolloutStep(group, len(sizes), step, steps)
            if prompt in self.fails and group == 2:
                raise self.fails[prompt]
            count = 1 if group == 1 else size * STRIDE
            pictures = np.stack([_square(time_now + k, seed) for k in range(count)])[None]
            time_now += count
            yield VideoPiece(group, len(sizes), pictures, torch.full((1, 4, size, 4, 4), float(group)))


def _square(time_now: int, seed: int) -> np.ndarray:
    frame = np.full((SIZE, SIZE, 3), 40, np.uint8)
    left = 3 * time_now % (SIZE - 10)
    frame[10:20, left : left + 10] = (255, 60 + 40 * (seed % 4), 60)
    return frame


def wait_for(condition: Callable[[], Any], what: str, deadline: float = 90.0) -> Any:
    """Poll until the condition is true and return its value; the deadline is only for a broken program."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline:g} s in vain: {what}")
        time.sleep(0.01)
    return value


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_for


@pytest.fixture
def fake() -> FakePipeline:
    """A fake that works as fast as it can."""
    return FakePipeline()


@pytest.fixture
def paced() -> FakePipeline:
    """A fake that finishes a group only when the test allows it."""
    return FakePipeline(paced=True)


@pytest.fixture
def start_worker(tmp_path) -> Iterator[Callable[[Any], Worker]]:
    """Starts workers on one and the same folder, one after the other; all are stopped at the end."""
    running: list[Worker] = []

    def start(pipeline: Any, begin: bool = True) -> Worker:
        worker = Worker(Library(tmp_path / "data"), Engine(lambda: pipeline))
        running.append(worker)
        if begin:
            worker.start()
        return worker

    yield start
    for worker in running:
        worker.stop()
        worker.library.close()


@dataclass
class Site:
    url: str
    port: int
    worker: Worker
    stop: Callable[[], None]


@pytest.fixture
def start_site(tmp_path) -> Iterator[Callable[..., Site]]:
    """Starts real servers on free loopback ports, with a given pipeline."""
    sites: list[Site] = []

    def start(pipeline: Any, port: int = 0, **settings: Any) -> Site:
        from app.server import create_app, make_server

        config = AppConfig(**{"data_dir": tmp_path / "data", **settings})
        app = create_app(config, load=lambda: pipeline)
        listener = socket.create_server(("127.0.0.1", port))
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not stop"

        wait_for(lambda: server.started or not thread.is_alive(), "the server starts")
        assert server.started
        port = listener.getsockname()[1]
        site = Site(f"http://127.0.0.1:{port}", port, app.state.worker, stop)
        sites.append(site)
        return site

    yield start
    for site in sites:
        site.stop()
