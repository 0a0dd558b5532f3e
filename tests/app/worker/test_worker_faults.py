"""Faults around a job, not in it: the queue cannot be read, its end cannot be stored, the model cannot be loaded."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from waiting import wait_for
from worker_harness import WorkerHarness

import app.worker.worker
from app.storage.job_files import JobFiles
from app.storage.jobs import JobState
from app.storage.store import JobStore
from app.worker.worker import Worker


def test_a_queue_that_cannot_be_read_for_a_moment_is_read_again(harness: WorkerHarness,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: the worker must not end, or the server would start it again and again."""
    claim, failures = JobStore.claim, [sqlite3.OperationalError("database or disk is full")] * 3

    def failing(self: JobStore, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return claim(self, *arguments)

    monkeypatch.setattr(app.worker.worker, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(JobStore, "claim", failing)
    harness.start_worker()
    assert harness.wait(harness.submit()).state is JobState.DONE and not failures


def test_a_job_whose_end_cannot_be_stored_is_resumed_by_the_next_worker(harness: WorkerHarness,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = harness.submit(), harness.submit("blue")
    finish, failures = JobStore.finish, [sqlite3.OperationalError("database or disk is full")]

    def failing(self: JobStore, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return finish(self, *arguments)

    monkeypatch.setattr(JobStore, "finish", failing)
    harness.start_worker()
    assert harness.wait(second).state is JobState.DONE  # the worker has gone on
    assert harness.reload(first).state is JobState.RUNNING
    harness.stop_workers()
    harness.start_worker()
    assert harness.wait(first).state is JobState.DONE and harness.file(first).is_file()


def test_a_worker_removes_the_oldest_videos_beyond_the_limit(harness: WorkerHarness,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit in the options, not the one that the server was started with."""
    monkeypatch.setattr(JobFiles, "enforce_quota", lambda self, limit, keep: kept.append((limit, keep)) or [])
    kept: list[tuple[int, str]] = []
    harness.service.services.store.set_value("options", {"max_disk": 12345})
    harness.start_worker()
    job = harness.wait(harness.submit())
    wait_for(lambda: kept, "the quota is enforced")
    assert kept == [(12345, job.id)]


def test_a_model_that_cannot_be_loaded_is_reported_before_the_first_job(harness: WorkerHarness) -> None:
    """And by each job; once it can be loaded, the next job runs."""
    failures = [RuntimeError("the file is damaged")] * 2

    class Models:
        device = "cpu"

        def pipeline(self, folder: Any) -> Any:
            raise failures.pop()

    worker = Worker(harness.service.services, Models)  # type: ignore[arg-type]
    worker._warm_up()
    [status] = harness.service.services.store.workers()
    assert (status["number"], status["state"]) == (0, "ready")
    assert "RuntimeError: the file is damaged" in status["error"] and len(failures) == 1
