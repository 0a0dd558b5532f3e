"""The videos of a command are the same on a cluster of Ray, whatever dies meanwhile."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pipelines import SIZE, make_pipeline
from ray_cluster import start_cluster

from lvdm.cli import main
from lvdm.generation.latent_store import read_fingerprint, read_latents
from lvdm.generation.ray_actors import MAX_DEATHS, _Actors
from odvae.utils.errors import UserError

PROMPTS = [{"prompt": "red"}, {"prompt": "blue"}, {"prompt": "purple"}, {"prompt": "red"}]


@pytest.fixture
def cluster() -> Iterator[Any]:
    yield from start_cluster()


def test_ray_gives_the_same_videos_when_an_actor_dies(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """One video is finished, one cannot be generated; the actor of another is killed."""
    monkeypatch.chdir(tmp_path)
    make_pipeline(class_names=("red", "blue"), text_dim=0).save_pretrained("pipeline")
    Path("prompts.jsonl").write_text("".join(json.dumps({**SIZE, **prompt}) + "\n" for prompt in PROMPTS))
    command = ["generate", "--prompts", "prompts.jsonl", "--pipeline", "pipeline", "--batch", "1"]
    assert main([*command, "--out", "local"]) == 2
    local = capsys.readouterr()
    Path("ray").mkdir()
    for suffix in (".mp4", ".safetensors"):
        shutil.copy(Path("local/01-blue").with_suffix(suffix), "ray")
    killed: list[Any] = []
    call = _Actors._call

    def call_and_kill(self: _Actors, actor: Any, name: str, *batch: Any) -> None:
        call(self, actor, name, *batch)
        if name == "render" and not killed:
            killed.append(actor)
            cluster.kill(actor)

    monkeypatch.setattr(_Actors, "_call", call_and_kill)
    assert main([*command, "--out", "ray", "--on", "ray", "--devices", "cpu=1"]) == 2
    remote = capsys.readouterr()
    assert killed and "ray/01-blue.mp4 already exists" in remote.out
    assert remote.err.count("a worker died") == 1
    failed = [line for line in local.out.splitlines() if " failed: " in line]
    assert failed and [line.replace("local/", "ray/") for line in failed] == [
        line for line in remote.out.splitlines() if " failed: " in line]
    names = sorted(path.name for path in Path("local").iterdir())
    assert sorted(path.name for path in Path("ray").iterdir()) == names and len(names) == 7
    for name in ("00-red", "01-blue", "03-red"):
        (ours, latents), (theirs, expected) = (read_latents(Path(folder, f"{name}.mp4")) for folder in ("ray", "local"))
        assert ours == theirs and torch.equal(latents, expected)
        assert read_fingerprint(Path(f"ray/{name}.mp4")) == ours.fingerprint


class FakeRay(ModuleType):
    """Calls of actors that are functions of a method's name and a batch, one after the other."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=EOFError)
        self.killed = 0

    def start(self, actor: Callable[..., Any]) -> Any:
        return SimpleNamespace(call=SimpleNamespace(remote=partial(partial, actor)))

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Any) -> Any:
        return call(), None

    def kill(self, actor: Any) -> None:
        self.killed += 1


def test_a_batch_that_kills_every_actor_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake := FakeRay())
    started: list[Any] = []

    def actor(name: str, batch: tuple[int, ...] = ()) -> Any:
        if batch == (2,):
            raise EOFError("out of memory\ndetails")
        return name, batch

    with _Actors(lambda: started.append(None) or fake.start(actor)) as actors:  # type: ignore[func-returns-value]
        actors.add()
        actors.add()
        assert actors.ask("plan") == ("plan", ())
        ends = dict(actors.render([(0, 1), (2,), (3,)]))
        assert ends == {(0, 1): ("render", (0, 1)), (2,): "out of memory", (3,): ("render", (3,))}
    assert len(started) == fake.killed == 2 + MAX_DEATHS


def test_actors_that_never_start_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake := FakeRay())

    def actor(name: str) -> Any:
        raise EOFError("no such library")

    with _Actors(lambda: fake.start(actor)) as actors, pytest.raises(UserError, match="no worker is left: 3 died"):
        actors.add()
        actors.ask("plan")


def test_a_cluster_needs_on_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "red", "--devices", "cpu=2"]) == 2
    assert "add --on ray" in capsys.readouterr().err
