"""The jobs in SQLite: the queue, the running jobs, the history. They survive refreshes, restarts and kills."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.storage.database import Database
from app.storage.jobs import Job, JobKind, JobSignal, JobState, Progress, is_id, new_id, round_robin_order

MAX_ATTEMPTS = 3  # starts without progress, after which a job is marked failed: it may be what kills the worker


class JobStore:
    """The jobs in the SQLite file at `path`, created if it is missing. Safe in any thread and process."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path)

    # ---- the queue ----

    def submit(self, kind: JobKind, owner: str, params: dict[str, Any], title: str, parent: str = "") -> Job:
        """Put a new job at the end of its owner's queue."""
        with self._database.transaction() as db:
            position = db.execute("SELECT coalesce(max(position), 0) + 1 FROM jobs").fetchone()[0]
            job = Job(new_id(), kind, owner, JobState.QUEUED, params, title, time.time(), position, parent=parent)
            db.execute(
                "INSERT INTO jobs (id, kind, owner, state, params, title, position, progress, created, parent) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, kind, owner, job.state, json.dumps(params), title, position, json.dumps(asdict(job.progress)),
                 job.created, parent),
            )  # fmt: skip
        return job

    def queue(self) -> list[Job]:
        """Return the queued jobs, in the order in which they will run."""
        with self._database.connect() as db:
            return self._queue(db)

    @staticmethod
    def _queue(db: sqlite3.Connection) -> list[Job]:
        served = {row["owner"]: row["at"] for row in db.execute("SELECT * FROM served")}
        return round_robin_order([_job(row) for row in db.execute("SELECT * FROM jobs WHERE state = 'queued'")], served)

    def claim(self, worker: int = 0,
              must_wait: Callable[[Job, Sequence[Job]], bool] = lambda job, running: False) -> Job | None:
        """Mark the next job as running and return it; None if there is none.

        Args:
            worker: the number of the worker that runs it.
            must_wait: whether a job cannot run beside the running ones; later jobs may then run before it.
        """
        with self._database.transaction() as db:
            running = self._running(db)
            job = next((job for job in self._queue(db) if not must_wait(job, running)), None)
            if job is None:
                return None
            now = time.time()
            row = db.execute(
                "UPDATE jobs SET state = 'running', started = ?, finished = NULL, priority = 0, error = '', "
                "advice = '', attempts = attempts + 1, worker = ? WHERE id = ? RETURNING *",
                (now, worker, job.id),
            ).fetchone()
            db.execute("INSERT OR REPLACE INTO served VALUES (?, ?)", (job.owner, now))
        return _job(row)

    @staticmethod
    def _running(db: sqlite3.Connection) -> list[Job]:
        return [_job(row) for row in db.execute("SELECT * FROM jobs WHERE state = 'running'")]

    def signal(self, job_id: str, signal: JobSignal) -> None:
        """Pause, stop or cancel a job: at once if it is queued, at its next report if it is running. The worker stops a
        queued job that has results, as it completes its files. Does nothing to a job that has ended."""
        now = time.time()
        with self._database.transaction() as db:
            job = self._get(db, job_id)
            if job is None or job.state.ended:
                return
            has_results = job.revision > 0
            if job.state is JobState.RUNNING:
                db.execute("UPDATE jobs SET signal = ? WHERE id = ?", (signal, job_id))
            elif signal is JobSignal.PAUSE:
                db.execute("UPDATE jobs SET state = 'paused', priority = 0 WHERE id = ?", (job_id,))
            elif signal is JobSignal.STOP and has_results:
                db.execute("UPDATE jobs SET state = 'queued', priority = 1, signal = ? WHERE id = ?", (signal, job_id))
            else:
                db.execute(
                    "UPDATE jobs SET state = 'cancelled', priority = 0, finished = ? WHERE id = ?", (now, job_id)
                )

    def requeue(self, job_id: str) -> bool:
        """Queue a paused or ended job again, first in its owner's queue; it resumes from its files. False if it is
        queued or running."""
        with self._database.transaction() as db:
            return db.execute(
                "UPDATE jobs SET state = 'queued', signal = '', attempts = 0, error = '', advice = '', "
                "finished = NULL, position = (SELECT min(position) - 1 FROM jobs) "
                "WHERE id = ? AND state NOT IN ('queued', 'running')",
                (job_id,),
            ).rowcount > 0  # fmt: skip

    def move(self, job_id: str, by: int) -> None:
        """Move a job `by` places later in its owner's queue (negative: earlier), at most to an end."""
        with self._database.transaction() as db:
            job = self._get(db, job_id)
            if job is None or job.state is not JobState.QUEUED:
                return
            rows = db.execute("SELECT id, position FROM jobs WHERE state = 'queued' AND owner = ? ORDER BY position",
                              (job.owner,)).fetchall()  # fmt: skip
            ids = [row["id"] for row in rows]
            old = ids.index(job_id)
            ids.insert(min(max(old + by, 0), len(ids) - 1), ids.pop(old))
            for name, row in zip(ids, rows, strict=True):
                db.execute("UPDATE jobs SET position = ? WHERE id = ?", (row["position"], name))

    def edit(self, job_id: str, params: dict[str, Any], title: str) -> bool:
        """Give a queued or paused job without results other settings. False for any other job."""
        with self._database.transaction() as db:
            return db.execute(
                "UPDATE jobs SET params = ?, title = ? WHERE id = ? AND state IN ('queued', 'paused') AND revision = 0",
                (json.dumps(params), title, job_id),
            ).rowcount > 0  # fmt: skip

    def recover(self, worker: int = 0) -> list[Job]:
        """Queue the jobs that a crashed worker left running, first; to be called when it is certainly gone. A job that
        was started `MAX_ATTEMPTS` times without progress is marked failed."""
        with self._database.transaction() as db:
            jobs = [job for job in self._running(db) if job.worker == worker]
            for job in jobs:
                if job.signal is JobSignal.CANCEL:
                    db.execute("UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ?", (time.time(), job.id))
                elif job.signal is JobSignal.PAUSE:
                    db.execute("UPDATE jobs SET state = 'paused', signal = '' WHERE id = ?", (job.id,))
                elif job.attempts >= MAX_ATTEMPTS:
                    db.execute(
                        "UPDATE jobs SET state = 'failed', finished = ?, error = ?, advice = ? WHERE id = ?",
                        (time.time(), f"The worker crashed {job.attempts} times during this job.",
                         "The system may have run out of memory: ask for a smaller size, then retry.", job.id),
                    )  # fmt: skip
                else:
                    db.execute("UPDATE jobs SET state = 'queued', priority = 1 WHERE id = ?", (job.id,))
        return jobs

    # ---- the running job ----

    def set_progress(self, job_id: str, progress: Progress) -> JobSignal:
        """Store the progress of a job and return the signal that was sent to it."""
        with self._database.connect() as db:
            row = db.execute("UPDATE jobs SET progress = ? WHERE id = ? RETURNING signal",
                             (json.dumps(asdict(progress)), job_id)).fetchone()  # fmt: skip
        return JobSignal(row["signal"]) if row else JobSignal.CANCEL

    def update_result(self, job_id: str, **result: object) -> None:
        """Announce new files of a job, and merge `result` into its result."""
        with self._database.transaction() as db:
            job = self._get(db, job_id)
            if job is not None:
                db.execute("UPDATE jobs SET revision = revision + 1, attempts = 0, result = ? WHERE id = ?",
                           (json.dumps({**job.result, **result}), job_id))  # fmt: skip

    def note(self, job_id: str, text: str) -> None:
        """Add a note for the user; a repeated note is ignored."""
        with self._database.transaction() as db:
            job = self._get(db, job_id)
            if job is not None and text not in job.notes:
                db.execute("UPDATE jobs SET notes = ? WHERE id = ?", (json.dumps([*job.notes, text]), job_id))

    def finish(self, job_id: str, state: JobState, error: str = "", advice: str = "") -> None:
        """Set the state of a running job: ended, paused, or queued again, first."""
        finished = time.time() if state.ended else None
        with self._database.connect() as db:
            db.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, advice = ?, signal = '', priority = ? "
                "WHERE id = ? AND state = 'running'",
                (state, finished, error, advice, state is JobState.QUEUED, job_id),
            )

    # ---- the history ----

    def get(self, job_id: str) -> Job | None:
        """Return a job, or None."""
        if not is_id(job_id):
            return None
        with self._database.connect() as db:
            return self._get(db, job_id)

    @staticmethod
    def _get(db: sqlite3.Connection, job_id: str) -> Job | None:
        row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def find(self, *, owner: str | None = None, kinds: Sequence[JobKind] = (), states: Sequence[JobState] = (),
             search: str = "", favorites: bool = False, limit: int = 60, offset: int = 0) -> list[Job]:
        """Return jobs, newest first. Each word of `search` must be in the title or the settings."""
        where: list[str] = ["1"]
        values: list[Any] = []
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        for column, allowed in ("kind", kinds), ("state", states):
            if allowed:
                where.append(f"{column} IN ({', '.join('?' * len(allowed))})")
                values += allowed
        for word in search.split():
            escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            where.append("(title LIKE ? ESCAPE '\\' OR params LIKE ? ESCAPE '\\')")
            values += [f"%{escaped}%"] * 2
        if favorites:
            where.append("favorite")
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ? OFFSET ?"
        with self._database.connect() as db:
            return [_job(row) for row in db.execute(query, (*values, limit, offset))]

    def set_favorite(self, job_id: str, favorite: bool) -> None:
        """Mark a job. A favorite is never deleted to free disk space."""
        with self._database.connect() as db:
            db.execute("UPDATE jobs SET favorite = ? WHERE id = ?", (favorite, job_id))

    def delete(self, job_id: str) -> bool:
        """Delete a job; False if it is running or unknown."""
        with self._database.connect() as db:
            return db.execute("DELETE FROM jobs WHERE id = ? AND state != 'running'", (job_id,)).rowcount > 0

    # ---- the workers ----

    def workers(self) -> list[dict[str, Any]]:
        """Return the status of each worker: its number, `state` (starting, loading, ready or restarting), and what else
        was set, such as `device` and `error`."""
        with self._database.connect() as db:
            rows = db.execute("SELECT * FROM workers ORDER BY number").fetchall()
        return [{"number": row["number"], **json.loads(row["status"])} for row in rows]

    def set_worker(self, number: int, state: str, **status: Any) -> None:
        """Set the status of a worker."""
        with self._database.connect() as db:
            db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?)",
                       (number, json.dumps({"state": state, **status})))

    def clear_workers(self) -> None:
        """Forget all workers: a server starts."""
        with self._database.connect() as db:
            db.execute("DELETE FROM workers")

    # ---- values by name ----

    def get_value(self, name: str, default: Any = None) -> Any:
        """Return the value that was last stored under a name."""
        with self._database.connect() as db:
            row = db.execute("SELECT value FROM key_values WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else default

    def set_value(self, name: str, value: Any) -> None:
        with self._database.connect() as db:
            db.execute("INSERT OR REPLACE INTO key_values VALUES (?, ?)", (name, json.dumps(value)))


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"], kind=JobKind(row["kind"]), owner=row["owner"], state=JobState(row["state"]),
        params=json.loads(row["params"]), title=row["title"], position=row["position"], created=row["created"],
        started=row["started"], finished=row["finished"], progress=Progress(**json.loads(row["progress"])),
        signal=JobSignal(row["signal"]), revision=row["revision"], result=json.loads(row["result"]),
        notes=tuple(json.loads(row["notes"])), error=row["error"], advice=row["advice"],
        favorite=bool(row["favorite"]), priority=bool(row["priority"]), attempts=row["attempts"], parent=row["parent"],
        worker=row["worker"],
    )  # fmt: skip
