"""The order of the queue, signals, and recovery after a crash."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from app.storage.jobs import JobKind, JobSignal, JobState, Progress
from app.storage.store import MAX_ATTEMPTS, JobStore
from odvae.utils.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


def submit(store: JobStore, title: str, owner: str = "ada"):
    return store.submit(JobKind.GENERATE, owner, {"prompt": title}, title)


def order(store: JobStore) -> str:
    return "".join(job.title for job in store.queue())


def test_owners_take_turns_with_their_own_order(store):
    for title in "abcd":
        submit(store, title)
    for title in "xy":
        submit(store, title, "bob")
    assert order(store) == "axbycd"
    assert store.claim().title == "a"
    submit(store, "p", "cleo")
    assert order(store) == "xpbycd", "who has just had a turn comes last, who never had one first"
    ids = {job.title: job.id for job in store.queue()}
    store.move(ids["d"], -9)
    store.move(ids["x"], 1)
    assert order(store) == "ypdxbc"
    store.move(ids["d"], 1)
    assert order(store) == "ypbxdc"
    taken = [store.claim().title for _ in range(6)]
    assert "".join(taken) == "ypbxdc" and store.claim() is None


def test_signals_change_the_state_of_a_job(store):
    queued, started, running = submit(store, "w"), submit(store, "b"), submit(store, "r")
    store.update_result(started.id, frames=3)
    store.signal(queued.id, JobSignal.PAUSE)
    assert store.get(queued.id).state is JobState.PAUSED
    store.signal(started.id, JobSignal.PAUSE)
    store.signal(started.id, JobSignal.STOP)
    assert (store.get(started.id).state, store.get(started.id).signal) == (JobState.QUEUED, JobSignal.STOP), (
        "the worker completes it"
    )
    assert store.claim().id == started.id, "first"
    assert store.set_progress(started.id, Progress()) is JobSignal.STOP
    store.finish(started.id, JobState.STOPPED)
    store.signal(queued.id, JobSignal.CANCEL)
    assert store.get(queued.id).state is JobState.CANCELLED
    store.signal(queued.id, JobSignal.PAUSE)
    assert store.get(queued.id).state is JobState.CANCELLED, "what has ended stays"

    assert store.claim().id == running.id and not store.requeue(running.id)
    assert not store.edit(running.id, {}, "") and not store.delete(running.id)
    store.signal(running.id, JobSignal.PAUSE)
    assert store.set_progress(running.id, Progress(phase="sampling", done=1, total=4)) is JobSignal.PAUSE
    store.finish(running.id, JobState.PAUSED)
    assert store.get(running.id).progress.fraction == 0.25 and store.requeue(running.id)
    assert store.get(running.id).signal is JobSignal.NOTHING
    assert store.edit(running.id, {"prompt": "other"}, "other") and order(store) == "other"
    assert not store.edit(started.id, {}, "")


def test_recovered_jobs_run_first_and_fail_after_repeated_crashes(store):
    first, cancelled, other = submit(store, "f"), submit(store, "c"), submit(store, "o", "bob")
    assert store.claim().id == first.id and store.claim().id == other.id and store.claim().id == cancelled.id
    store.signal(cancelled.id, JobSignal.CANCEL)
    submit(store, "n", "cleo")
    assert store.recover(1) == [], "they are of worker 0"
    assert {job.id for job in store.recover()} == {first.id, other.id, cancelled.id}
    assert store.get(cancelled.id).state is JobState.CANCELLED
    assert order(store) == "fon"
    for _ in range(MAX_ATTEMPTS - 1):
        assert store.claim().id == first.id
        store.update_result(first.id)  # it gets on
        store.recover()
    for _ in range(MAX_ATTEMPTS):
        assert store.claim().id == first.id
        store.recover()
    assert store.get(first.id).state is JobState.FAILED and "crashed 3 times" in store.get(first.id).error
    assert store.requeue(first.id) and store.claim().id == other.id


def test_history_finds_words_and_is_private_to_its_owner(store):
    for title in ("a red circle", "100% blue_sky", "a green \\ cross"):
        submit(store, title)
    submit(store, "a red cross", "bob")
    assert [job.title for job in store.find(search="red a")] == ["a red cross", "a red circle"]
    assert [job.title for job in store.find(search="red", owner="ada")] == ["a red circle"]
    for search, count in (("100%", 1), ("_", 1), ("%", 1), ("\\", 1), ("' OR 1 --", 0)):
        assert len(store.find(search=search, owner="ada")) == count, search
    store.set_favorite(store.find(search="circle")[0].id, True)
    assert [job.title for job in store.find(favorites=True)] == ["a red circle"]
    assert [job.title for job in store.find(limit=1, offset=1)] == ["a green \\ cross"]
    assert store.get("../../etc/passwd") is None and store.get("' OR 1 --") is None


def test_an_unusable_database_is_reported(tmp_path):
    (tmp_path / "jobs.sqlite3").write_text("no database" * 100)
    with pytest.raises(UserError, match="not a usable history"):
        JobStore(tmp_path / "jobs.sqlite3")
    with sqlite3.connect(tmp_path / "new.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="format version 99"):
        JobStore(tmp_path / "new.sqlite3")
