"""The history survives what happens to the server."""

import sqlite3
import threading

import pytest

from app.jobs import Progress, State
from app.params import Params
from app.store import Store
from odvae.runtime.errors import UserError


def settings(prompt: str) -> Params:
    return Params(prompt=prompt, seed=1, frames=17, frame_rate=8.0, steps=4, guidance=3.0)


def test_reopened_store_has_everything_and_the_running_job_is_interrupted(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    first, second, third = (store.submit(settings(prompt)) for prompt in ("one", "two", "drei 中文 '; DROP TABLE jobs"))
    assert store.claim().id == first.id
    store.finish(first.id, State.DONE)
    assert store.claim().id == second.id
    progress = Progress(phase="sampling", group=1, groups=3, step=2, steps=4, frames=9, seconds_left=1.5)
    store.set_progress(second.id, progress)
    store.publish(second.id)

    again = Store(tmp_path / "jobs.sqlite3")  # as after a kill: nothing was closed
    assert again.interrupt_running() == 1
    assert [job.state for job in again.newest(9)] == [State.QUEUED, State.INTERRUPTED, State.DONE]
    kept = again.get(second.id)
    assert (kept.params, kept.progress, kept.revision) == (settings("two"), progress, 1)
    assert again.claim().id == third.id, "what was queued goes on"


def test_jobs_are_claimed_once_and_in_order_by_many_threads(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    ids = [store.submit(settings(str(k))).id for k in range(20)]
    taken: list[str] = []

    def take() -> None:
        while job := store.claim():
            taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)


def test_claims_come_in_the_order_of_submission_and_ahead_counts(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    ids = [store.submit(settings(str(k))).id for k in range(3)]
    assert [store.ahead(job_id) for job_id in ids] == [0, 1, 2]
    assert [store.claim().id for _ in ids] == ids
    assert store.claim() is None


def test_cancel_ends_a_queued_job_and_asks_a_running_one(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    running, queued = store.submit(settings("one")), store.submit(settings("two"))
    store.claim()
    for job in (running, queued):
        store.request_cancel(job.id)
    assert store.get(queued.id).state is State.CANCELLED
    assert store.get(running.id).state is State.RUNNING
    assert store.set_progress(running.id, Progress()), "the worker is told"
    store.finish(running.id, State.DONE)
    store.request_cancel(running.id)
    assert store.get(running.id).state is State.DONE, "what has ended stays as it is"


def test_a_running_job_is_not_deleted(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    job = store.submit(settings("one"))
    store.claim()
    assert not store.delete(job.id)
    store.finish(job.id, State.DONE)
    assert store.delete(job.id) and store.get(job.id) is None


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to be looked at" * 20, None])
def test_a_file_that_is_no_history_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "jobs.sqlite3"
    if content is None:
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"jobs\.sqlite3"):
        Store(path)
    if content is not None:
        assert path.read_bytes() == before
