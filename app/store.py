"""The jobs in SQLite: what is queued, what runs, what was made. It survives refreshes, restarts and kills.

Every call opens its own connection: that costs a tenth of a millisecond and makes the store safe in any thread.
WAL lets the page read while the worker writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from app.jobs import Job, Progress, State, is_id, new_id
from app.params import Params
from odvae.runtime.errors import UserError

VERSION = 1
SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order of the queue
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    params TEXT NOT NULL,
    progress TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    revision INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    advice TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs_by_state ON jobs (state, number);
"""


class Store:
    """The table of jobs in the SQLite file at `path` (made where it is missing)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with self._connect() as db:
                db.execute("PRAGMA journal_mode = WAL")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} is no usable history ({error}). Move it away, or choose another --data-dir."
            ) from error
        if version not in (0, VERSION):
            raise UserError(f"{path} is of version {version}, this program knows {VERSION}. Choose another --data-dir.")

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            yield db
        finally:
            db.close()

    def submit(self, params: Params) -> Job:
        """Put a new job at the end of the queue."""
        job = Job(id=new_id(), state=State.QUEUED, params=params, created=time.time())
        with self._connect() as db:
            db.execute(
                "INSERT INTO jobs (id, state, params, progress, created) VALUES (?, ?, ?, ?, ?)",
                (job.id, job.state, params.model_dump_json(), json.dumps(asdict(job.progress)), job.created),
            )
        return job

    def get(self, job_id: str) -> Job | None:
        """The job of that id, or None."""
        if not is_id(job_id):
            return None
        with self._connect() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def newest(self, limit: int) -> list[Job]:
        """The history, newest first."""
        with self._connect() as db:
            return [_job(row) for row in db.execute("SELECT * FROM jobs ORDER BY number DESC LIMIT ?", (limit,))]

    def ahead(self, job_id: str) -> int:
        """How many jobs run or wait before this one."""
        with self._connect() as db:
            query = """SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')
                       AND number < (SELECT number FROM jobs WHERE id = ?)"""
            return int(db.execute(query, (job_id,)).fetchone()[0])

    def queued(self) -> int:
        """How many jobs wait."""
        with self._connect() as db:
            return int(db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0])

    def claim(self) -> Job | None:
        """Take the oldest queued job and mark it running; None where none waits."""
        with self._connect() as db:
            row = db.execute(
                """UPDATE jobs SET state = 'running', started = ? WHERE number =
                   (SELECT number FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1) RETURNING *""",
                (time.time(),),
            ).fetchone()
        return _job(row) if row else None

    def set_params(self, job_id: str, params: Params) -> None:
        """The settings as they are really used (a model's grid may be known only when it is loaded)."""
        with self._connect() as db:
            db.execute("UPDATE jobs SET params = ? WHERE id = ?", (params.model_dump_json(), job_id))

    def set_progress(self, job_id: str, progress: Progress) -> bool:
        """Note the progress of a running job; returns whether somebody wants it cancelled."""
        with self._connect() as db:
            row = db.execute(
                "UPDATE jobs SET progress = ? WHERE id = ? RETURNING cancel_requested",
                (json.dumps(asdict(progress)), job_id),
            ).fetchone()
        return bool(row and row[0])

    def publish(self, job_id: str) -> None:
        """A longer version of the video is on disk."""
        with self._connect() as db:
            db.execute("UPDATE jobs SET revision = revision + 1 WHERE id = ?", (job_id,))

    def finish(self, job_id: str, state: State, error: str = "", advice: str = "") -> None:
        """A running job has come to its end."""
        with self._connect() as db:
            db.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, advice = ? WHERE id = ? AND state = 'running'",
                (state, time.time(), error, advice, job_id),
            )

    def request_cancel(self, job_id: str) -> None:
        """A queued job is cancelled at once, a running one at its next step; a finished one stays as it is."""
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ? AND state = 'queued'",
                (time.time(), job_id),
            )
            db.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ? AND state = 'running'", (job_id,))
            db.execute("COMMIT")

    def interrupt_running(self) -> int:
        """At start: what still says "running" died with its server. Returns how many."""
        with self._connect() as db:
            cursor = db.execute(
                "UPDATE jobs SET state = 'interrupted', finished = ? WHERE state = 'running'", (time.time(),)
            )
            return cursor.rowcount

    def delete(self, job_id: str) -> bool:
        """Forget a job; a running one is kept and False returned."""
        with self._connect() as db:
            return db.execute("DELETE FROM jobs WHERE id = ? AND state != 'running'", (job_id,)).rowcount > 0


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        state=State(row["state"]),
        params=Params.model_validate_json(row["params"]),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        progress=Progress(**json.loads(row["progress"])),
        cancel_requested=bool(row["cancel_requested"]),
        revision=row["revision"],
        error=row["error"],
        advice=row["advice"],
    )
