"""Several workers: jobs run at once, each once and on a device of its own; one that dies is alone in that."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import scripted_pipeline
import worker_environment
from waiting import wait_for

import app.worker.supervisor
from app.cli import parse
from app.config import AppConfig
from app.storage.asset_scanner import asset_id
from app.storage.jobs import Job, JobKind, JobState
from app.storage.store import JobStore
from app.tasks.conflicts import must_wait
from app.worker import devices
from app.worker.supervisor import Supervisor
from odvae.utils.errors import UserError

REQUEST = {"seconds": 2, "num_inference_steps": 2, "seed": 7}


@pytest.fixture
def supervisors() -> Iterator[list[Supervisor]]:
    """Supervisors that the test has started, to be stopped."""
    started: list[Supervisor] = []
    yield started
    for supervisor in started:
        supervisor.stop()


def test_two_workers_run_two_jobs_at_once_and_one_is_killed(harness, gate, supervisors):
    service, store = harness.service, harness.service.store
    supervisors.append(Supervisor(harness.config.model_copy(update={"workers": 2}), store, scripted_pipeline.load))
    supervisors[0].start()
    first, second = (service.submit(JobKind.GENERATE, REQUEST | {"prompt": f"{color}, waits 2"}, "me")
                     for color in ("red", "blue"))
    wait_for(lambda: all(store.get(job.id).progress.group == 3 for job in (first, second)), "both are at their end")
    workers = {status["number"]: status["pid"] for status in store.workers()}
    assert {store.get(job.id).worker for job in (first, second)} == {0, 1} == workers.keys()
    killed = store.get(first.id).worker
    os.kill(workers[killed], signal.SIGKILL)
    wait_for(lambda: store.workers()[killed].get("pid") not in (None, workers[killed]), "another one is there")
    untouched = store.get(second.id)
    assert (untouched.state, untouched.worker) == (JobState.RUNNING, 1 - killed)
    assert store.workers()[1 - killed]["pid"] == workers[1 - killed]
    gate(2)
    wait_for(lambda: not store.find(states=[JobState.QUEUED, JobState.RUNNING]), "all end")
    for job, starts in ((first, 2), (second, 1)):
        assert store.get(job.id).state is JobState.DONE
        log = (service.job_files.folder(job) / "log.txt").read_text()
        assert (log.count("started"), log.count("done after")) == (starts, 1)


def test_each_worker_sees_its_device_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          supervisors: list[Supervisor]) -> None:
    """Also after its predecessor has died."""
    monkeypatch.setenv(devices.VISIBLE, "GPU-a,GPU-b")
    monkeypatch.setattr(Supervisor, "_count_devices", lambda self: 2)
    monkeypatch.setattr(app.worker.supervisor, "run_worker", worker_environment.write)
    monkeypatch.setattr(app.worker.supervisor, "RESTART_DELAY", 0.0)
    supervisors.append(Supervisor(AppConfig(data_dir=tmp_path), JobStore(tmp_path / "jobs.sqlite3")))
    supervisors[0].start()

    def shown() -> dict[int, tuple[str, int]]:
        return {number: tuple(json.loads(path.read_text())) for number in range(2)
                if (path := tmp_path / f"{number}.json").exists()}

    before = wait_for(lambda: len(shown()) == 2 and shown(), "both start")
    assert [before[number][0] for number in range(2)] == ["GPU-a", "GPU-b"]
    os.kill(before[1][1], signal.SIGKILL)
    wait_for(lambda: shown()[1][1] != before[1][1], "another one starts")
    assert shown()[1][0] == "GPU-b" and shown()[0] == before[0]


@pytest.mark.parametrize("workers, count, environment, expected", [
    (1, 0, {}, [None]),
    (2, 0, {}, [None, None]),
    (2, 2, {}, ["0", "1"]),
    (1, 4, {devices.VISIBLE: "3,1"}, ["3"]),
    (3, 2, {devices.VISIBLE: "3, 1"}, ["3", "1", "3"])])
def test_devices_of_workers(workers: int, count: int, environment: dict[str, str], expected: list[str]) -> None:
    variables = [devices.worker_environment(k, workers, count, environment) for k in range(workers)]
    assert [one.get(devices.VISIBLE) for one in variables] == expected
    assert all((devices.THREADS in one) == (workers > 1) for one in variables)


def test_the_number_of_workers_is_auto_or_a_number() -> None:
    assert [parse(options).workers for options in ([], ["--workers", "auto"], ["--workers", "3"])] == [0, 0, 3]
    with pytest.raises(UserError, match="workers = 'many': must be a whole number"):
        parse(["--workers", "many"])


def test_a_job_waits_for_one_that_writes_what_it_uses(tmp_path: Path) -> None:
    config = AppConfig(workspace=tmp_path)
    build = make_job(JobKind.CACHE, name="new")
    cache = asset_id(tmp_path / "caches" / "new")
    train, same = make_job(JobKind.TRAIN, caches=[cache], name="run"), make_job(JobKind.TRAIN, name="run")
    longer, other = make_job(JobKind.GENERATE, job=train.id), make_job(JobKind.TRAIN, caches=[cache], name="other")
    assert must_wait(config, train, [build]) and must_wait(config, build, [train])
    assert must_wait(config, same, [train]) and must_wait(config, longer, [train])
    assert not must_wait(config, other, [train]) and not must_wait(config, longer, [build])
    extend = make_job(JobKind.CACHE, cache=cache)
    assert must_wait(config, extend, [build]) and must_wait(config, extend, [other])


def make_job(kind: JobKind, **params: object) -> Job:
    return Job(f"{kind} {sorted(params.items())}", kind, "me", JobState.QUEUED, params, "title", 0.0)


def test_the_quota_keeps_the_last_job_of_each_worker(harness):
    store, files = harness.service.store, harness.service.job_files
    jobs = []
    for number, worker in enumerate((0, 1, 0)):
        store.set_worker(worker, "ready")
        harness.submit(f"red {number}")
        jobs.append(store.claim(worker))
        (files.prepare(jobs[-1]) / "final.mp4").write_bytes(bytes(100))
        store.finish(jobs[-1].id, JobState.DONE)
    assert [job.id for job in files.enforce_quota(1, keep=jobs[2].id)] == [jobs[0].id]
    assert store.get(jobs[1].id) is not None, "its page may be about to show it"
