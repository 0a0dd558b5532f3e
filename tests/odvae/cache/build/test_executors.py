"""A build gives the same bytes wherever its tasks run, and whatever dies meanwhile: workers, the driver, decoders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import start_cluster
from tiny_cache import SHAPE, read_files, tiny_vae, write_noise
from waiting import TIMEOUT, has_ended

from odvae.cache import build_cache
from odvae.cache.build.executors import executor as executor_module
from odvae.cache.build.executors import open_executor
from odvae.cache.build.executors.executor import Executor
from odvae.cache.build.executors.ray_actors import plan_actors
from odvae.cache.build.executors.runner import RunnerSpec, tensor_bytes
from odvae.cache.build.executors.worker import ProbeTask, WorkerDiedError
from odvae.cache.build.settings import BuildSettings
from odvae.cache.build.usage import Usage
from odvae.cache.encoder import LatentEncoder
from odvae.cache.maintain.rejects import read_rejects
from odvae.data.scratch import open_scratch
from odvae.data.sources import MediaRef
from odvae.utils.backoff import Backoff
from odvae.utils.errors import UserError
from odvae.utils.processes import process_context
from odvae.utils.storage import open_storage

FILES = 16
USAGE = {"decode_seconds", "encode_seconds", "read_bytes"}  # what a build that has encoded has spent
SETTINGS: dict[str, Any] = SHAPE | {"shard_clips": 1, "psnr_clips": 2, "file_seconds": 4.0}

# A build by Ray in a process of its own, which is killed.
DRIVER = """
from odvae.cache import build_cache
from tiny_cache import tiny_vae

build_cache(job["source"], job["cache"], tiny_vae(), on="ray", address=job["address"], **job["settings"])
"""


class Source:
    """Good files, one that crashes every decoder that opens it, and one that hangs: both are pipes."""

    def __init__(self, folder: Path) -> None:
        self.crash, hang, self.list = folder / "crash.mp4", folder / "hang.mp4", folder / "list.jsonl"
        names = [write_noise(folder / f"clip_{k}.mp4", k).name for k in range(FILES)]
        names[3:3] = [self.crash.name, hang.name]
        os.mkfifo(self.crash)
        os.mkfifo(hang)
        self.list.write_text("".join(json.dumps({"path": name, "caption": name}) + "\n" for name in names))
        self._is_closed = False
        self._thread = threading.Thread(target=self._kill_readers)
        self._thread.start()

    def _kill_readers(self) -> None:
        while not self._is_closed:
            with open(self.crash, "wb"):  # waits for a reader
                for pid in readers(self.crash):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSEGV)

    def close(self) -> None:
        self._is_closed = True
        os.close(os.open(self.crash, os.O_RDONLY | os.O_NONBLOCK))
        self._thread.join()


def wait_for(condition: Callable[[], object], seconds: float = TIMEOUT) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def readers(path: Path) -> list[int]:
    """Return the other processes that have a file open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry) == str(path) and int(entry.parts[2]) != os.getpid():
                found.append(int(entry.parts[2]))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    source = Source(tmp_path_factory.mktemp("source"))
    yield source.list
    source.close()


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache that one encoder in this process makes."""
    cache = tmp_path_factory.mktemp("expected") / "cache"
    summary = build_cache(source, cache, tiny_vae(), **SETTINGS)
    rejects = {row["path"]: row["kind"] for row in read_rejects(cache).to_pylist()}
    assert (rejects, summary.done) == ({"crash.mp4": "crash", "hang.mp4": "hang"}, FILES)
    assert list(summary.rates) == ["cpu"] and summary.rates["cpu"] > 0
    assert summary.usage.keys() >= USAGE and (summary.encoders, summary.decoders) == (1, 1)
    return read_files(cache)


def family(*pids: int) -> list[psutil.Process]:
    """Return processes with all that they have started."""
    parents = [psutil.Process(pid) for pid in pids]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def all_ended(processes: list[psutil.Process]) -> bool:
    assert len(processes) > 2  # an encoder, the server of its decode workers, and these
    return wait_for(lambda: all(map(has_ended, processes)))


def after_first_shard(action: Callable[[Executor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next build do something once its first shard is committed."""
    encode, times = Executor.encode, iter(range(1))

    def encode_and_act(self: Executor, units: Iterable[Any]) -> Iterator[Any]:
        for done in encode(self, units):
            for _ in times:
                action(self)
            yield done

    monkeypatch.setattr(Executor, "encode", encode_and_act)


def test_two_devices_of_this_machine(source: Path, expected: dict[str, bytes], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The first build is stopped by Ctrl-C; one of the second's processes is killed."""
    cache, settings = tmp_path / "cache", SETTINGS | {"devices": ("cpu", "cpu")}
    processes: list[psutil.Process] = []
    executors: list[Executor] = []

    def note(executor: Executor) -> None:
        executors.append(executor)
        processes.extend(family(*(slot.worker._process.pid for slot in executor._slots)))  # type: ignore[union-attr]

    def stop(executor: Executor) -> None:
        note(executor)
        signal.raise_signal(signal.SIGINT)

    def kill(executor: Executor) -> None:
        note(executor)
        executor._slots[0].worker._process.kill()  # type: ignore[union-attr]

    after_first_shard(stop, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build_cache(source, cache, tiny_vae(), **settings)
    assert all_ended(processes) and len(list(cache.rglob("*.safetensors"))) < FILES
    after_first_shard(kill, monkeypatch)
    summary = build_cache(source, cache, tiny_vae(), **settings)
    assert executors[1].has_lost and 0 < summary.done < FILES and set(summary.rates) <= {"cpu#0", "cpu#1"}
    assert summary.usage.keys() >= USAGE
    assert read_files(cache) == expected and all_ended(processes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    yield from start_cluster()


def test_ray_goes_on_when_an_actor_and_the_driver_are_killed(
        cluster: Any, source: Path, expected: dict[str, bytes], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    cache, script, settings = tmp_path / "cache", tmp_path / "driver.py", SETTINGS | {"devices": ("cpu=1",)}
    script.write_text(DRIVER)
    job = {"source": str(source), "cache": str(cache), "address": cluster.get_runtime_context().gcs_address,
           "settings": settings}
    driver: Any = process_context("odvae.cache.build.builder").Process(  # type: ignore[attr-defined]
        target=runpy.run_path, args=(str(script), {"job": job}))
    driver.start()
    assert wait_for(lambda: any(cache.rglob("*.safetensors")) or driver.exitcode is not None)
    driver.kill()
    driver.join()
    assert 0 < len(list(cache.rglob("*.safetensors"))) < FILES
    processes: list[psutil.Process] = []

    def kill(executor: Executor) -> None:
        actors = [slot.worker._actor for slot in executor._slots  # type: ignore[union-attr]
                  if slot.is_ready]
        pids = cluster.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
        processes.extend(family(*pids))
        os.kill(pids[0], signal.SIGKILL)

    after_first_shard(kill, monkeypatch)
    summary = build_cache(source, cache, tiny_vae(), on="ray", **settings)
    assert 0 < summary.done < FILES and summary.usage.keys() >= USAGE
    assert read_files(cache) == expected and all_ended(processes)


def test_ray_refuses_what_no_actor_can_use(cluster: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory://cache is in the memory of this process"):
        build_cache(source, "memory://cache", tiny_vae(), on="ray", **SETTINGS)
    with pytest.raises(UserError, match="gpu=16 or cpu=32"):
        build_cache(source, tmp_path / "cache", tiny_vae(), on="ray", devices=("cuda:0",), **SETTINGS)


def test_actors_of_a_cluster() -> None:
    gpus, cpus = {"GPU": 4.0, "CPU": 32.0}, {"CPU": 16.0}
    assert plan_actors(BuildSettings(), [gpus, gpus, cpus]) == (1, 8, 8)
    assert plan_actors(BuildSettings(workers=3), [gpus]) == (1, 3, 4)
    assert plan_actors(BuildSettings(), [cpus, cpus]) == (0, 1, 32)
    assert plan_actors(BuildSettings(workers=4), [cpus]) == (0, 4, 4)
    assert plan_actors(BuildSettings(devices=("gpu=16",)), [cpus]) == (1, 8, 16)  # the autoscaler brings them
    assert plan_actors(BuildSettings(devices=("cpu=2",)), [gpus]) == (0, 1, 2)
    with pytest.raises(UserError, match="no node of the Ray cluster has 32 CPUs"):
        plan_actors(BuildSettings(workers=32), [cpus])


def test_a_vae_is_loaded_again_from_its_tensors(source: Path, tmp_path: Path) -> None:
    encoder = LatentEncoder(tiny_vae(3).half())
    spec = RunnerSpec.of(encoder, open_storage(tmp_path), BuildSettings(), str(source))
    again = spec.vae.load(tensor_bytes(encoder.model))
    assert LatentEncoder(again).header == encoder.header and again.dtype == encoder.model.dtype and not again.training
    with pytest.raises(UserError, match="AutoencoderKLODVAE is another one on"):
        spec.open(tensor_bytes(tiny_vae(4)), "cpu", 1, contextlib.ExitStack())
    for changed, message in (({"shared": (str(tmp_path / "none"),)}, "cannot see .*none; give a folder that all nodes"),
                             ({"folder": str(tmp_path / "none")}, "has no folder .*none; build from a folder")):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(spec, **changed).open(b"", "cpu", 1, contextlib.ExitStack())


def test_workers_of_a_machine_fetch_a_file_once(tmp_path: Path) -> None:
    ref = MediaRef("clip.mp4", write_noise(tmp_path / "clip.mp4").as_uri(), "1")
    encoder = LatentEncoder(tiny_vae())
    with open_scratch(.001) as scratch, contextlib.ExitStack() as stack:
        assert scratch is not None
        spec = RunnerSpec.of(encoder, open_storage(tmp_path), BuildSettings(), str(tmp_path), scratch)
        runners = [spec.open(tensor_bytes(encoder.model), "cpu", 1, stack) for _ in range(2)]
        for runner in runners:
            stack.callback(runner.stop)
            assert runner.submit(ProbeTask((ref,))).result()[0].frames
        assert [runner.usage.take().get("fetches") for runner in runners] == [1, None]
        assert runners[0].usage.figures() == {}
        stack.close()
        assert os.path.isdir(scratch.folder)
    assert not os.path.exists(scratch.folder)


@pytest.mark.parametrize("options, message", [({"devices": ("gpu",)}, "--devices gpu cannot be used"),
                                              ({"address": "auto"}, "add --on ray")])
def test_wrong_devices(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_executor(LatentEncoder(tiny_vae()), open_storage(tmp_path), BuildSettings(**options), "source", Backoff(0))


class FakeWorker:
    """Runs one task at a time; some files kill it, with all tasks that it has."""

    def __init__(self, name: str, deadly: set[str], log: list[list[str]]) -> None:
        self.name, self.deadly, self.log = name, deadly, log
        self.decoders, self.usage = 1, Usage()
        self.ready: Future[None] = Future()
        self.tasks: dict[Future[Any], ProbeTask] = {}
        self.thread, self.lock = ThreadPoolExecutor(1), threading.RLock()
        if "start" in deadly:
            self.ready.set_exception(WorkerDiedError("it does not start"))
        else:
            self.ready.set_result(None)

    def submit(self, task: ProbeTask) -> Future[Any]:
        future: Future[Any] = Future()
        with self.lock:
            self.tasks[future] = task
        self.thread.submit(self.run, future)
        return future

    def run(self, future: Future[Any]) -> None:
        with self.lock:
            tasks = list(self.tasks.values())
            self.log.append([task.refs[0].name for task in tasks])
            dead = not self.deadly.isdisjoint(ref.name for task in tasks for ref in task.refs)
            ended = list(self.tasks) if dead else [future] if future in self.tasks else []
            results = [self.tasks.pop(one) for one in ended]
        for one, task in zip(ended, results, strict=True):
            if dead:
                one.set_exception(WorkerDiedError("it was killed"))
            else:
                one.set_result([ref.name for ref in task.refs])

    def stop(self) -> None:
        self.thread.shutdown(wait=False)


def run_fakes(monkeypatch: pytest.MonkeyPatch, count: int, deadly: set[str],
              broken: tuple[int, ...] = ()) -> tuple[list[Any], list[list[str]]]:
    """Return the results of 40 tasks, and what each worker had at hand whenever it finished one."""
    monkeypatch.setattr(executor_module, "PROBE_FILES", 1)
    log: list[list[str]] = []
    with Executor(lambda k: FakeWorker(str(k), {"start"} if k in broken else deadly, log), count) as executor:
        return list(executor.probe([MediaRef(str(k), f"videos/{k}", "") for k in range(40)])), log


def test_a_task_that_kills_every_worker_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fakes(monkeypatch, 3, set())[0] == [str(k) for k in range(40)]
    with pytest.raises(UserError, match=r"videos/7: the worker died 3 times"):
        run_fakes(monkeypatch, 3, {"7"})


def test_a_device_whose_workers_all_die_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fakes(monkeypatch, 3, set(), broken=(0, 2))[0] == [str(k) for k in range(40)]
    with pytest.raises(UserError, match=r"no worker is left; the last one, on .*: it does not start"):
        run_fakes(monkeypatch, 2, set(), broken=(0, 1))
