"""The jobs in SQLite: what is queued, what runs, what was made. It survives refreshes, restarts and kills.

Two processes use it, the server and the worker; every call opens its own connection, which costs a tenth of a
millisecond and makes the store safe in any thread. WAL lets the page read while the worker writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.storage.jobs import Job, JobKind, JobSignal, JobState, Progress, is_id, new_id, round_robin_order
from odvae.utils.errors import UserError

VERSION = 4
ATTEMPTS = 3  # starts without getting on, after which a job is not tried again: it may be what kills the server
SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    params TEXT NOT NULL,
    title TEXT NOT NULL,
    position REAL NOT NULL,
    progress TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    signal TEXT NOT NULL DEFAULT '',
    revision INTEGER NOT NULL DEFAULT 0,
    result TEXT NOT NULL DEFAULT '{}',
    notes TEXT NOT NULL DEFAULT '[]',
    error TEXT NOT NULL DEFAULT '',
    advice TEXT NOT NULL DEFAULT '',
    favorite INTEGER NOT NULL DEFAULT 0,
    priority INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    parent TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE served (owner TEXT PRIMARY KEY, at REAL NOT NULL);          -- whose turn was when
CREATE TABLE key_values (name TEXT PRIMARY KEY, value TEXT NOT NULL);    -- JSON: options, the model, measured times
"""


class JobStore:
    """The tables in the SQLite file at `path` (made where it is missing)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with self._connect() as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("COMMIT")
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

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it happens, or nothing."""
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    # ---- the queue ----

    def submit(self, kind: JobKind, owner: str, params: dict[str, Any], title: str, parent: str = "") -> Job:
        """Put a new job at the end of its owner's queue."""
        with self._changing() as db:
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
        """The jobs that wait, in the order in which they will run."""
        with self._connect() as db:
            return self._queue(db)

    @staticmethod
    def _queue(db: sqlite3.Connection) -> list[Job]:
        served = {row["owner"]: row["at"] for row in db.execute("SELECT * FROM served")}
        return round_robin_order([_job(row) for row in db.execute("SELECT * FROM jobs WHERE state = 'queued'")], served)

    def claim(self) -> Job | None:
        """Mark the job whose turn it is as running; None where none waits."""
        with self._changing() as db:
            queue = self._queue(db)
            if not queue:
                return None
            now = time.time()
            row = db.execute(
                "UPDATE jobs SET state = 'running', started = ?, finished = NULL, priority = 0, error = '', "
                "advice = '', attempts = attempts + 1 WHERE id = ? RETURNING *",
                (now, queue[0].id),
            ).fetchone()
            db.execute("INSERT OR REPLACE INTO served VALUES (?, ?)", (queue[0].owner, now))
        return _job(row)

    def signal(self, job_id: str, signal: JobSignal) -> None:
        """Pause, stop or cancel a job: at once while it waits, at its next report while it runs. One that was begun and
        waits is stopped by the worker, which completes what is there. Harmless for one that has ended."""
        now = time.time()
        with self._changing() as db:
            job = self._one(db, job_id)
            if job is None or job.state.ended:
                return
            begun = job.revision > 0
            if job.state is JobState.RUNNING:
                db.execute("UPDATE jobs SET signal = ? WHERE id = ?", (signal, job_id))
            elif signal is JobSignal.PAUSE:
                db.execute("UPDATE jobs SET state = 'paused', priority = 0 WHERE id = ?", (job_id,))
            elif signal is JobSignal.STOP and begun:
                db.execute("UPDATE jobs SET state = 'queued', priority = 1, signal = ? WHERE id = ?", (signal, job_id))
            else:
                db.execute(
                    "UPDATE jobs SET state = 'cancelled', priority = 0, finished = ? WHERE id = ?", (now, job_id)
                )

    def requeue(self, job_id: str) -> bool:
        """A job that is paused or has ended waits again, first of its owner's; what it has made is gone on from."""
        with self._changing() as db:
            return db.execute(
                "UPDATE jobs SET state = 'queued', signal = '', attempts = 0, error = '', advice = '', "
                "finished = NULL, position = (SELECT min(position) - 1 FROM jobs) "
                "WHERE id = ? AND state NOT IN ('queued', 'running')",
                (job_id,),
            ).rowcount > 0  # fmt: skip

    def move(self, job_id: str, by: int) -> None:
        """Change places with the owner's job that waits `by` places later (negative: earlier); the ends are walls."""
        with self._changing() as db:
            job = self._one(db, job_id)
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
        """Other settings for a job that waits and was never begun; False where it is not so."""
        with self._changing() as db:
            return db.execute(
                "UPDATE jobs SET params = ?, title = ? WHERE id = ? AND state IN ('queued', 'paused') AND revision = 0",
                (json.dumps(params), title, job_id),
            ).rowcount > 0  # fmt: skip

    def recover(self) -> list[Job]:
        """At the worker's start: what still says "running" died with the one before, and goes on, first. One that was
        begun again and again without getting on is given up."""
        with self._changing() as db:
            found = [_job(row) for row in db.execute("SELECT * FROM jobs WHERE state = 'running'")]
            for job in found:
                if job.signal is JobSignal.CANCEL:
                    db.execute("UPDATE jobs SET state = 'cancelled', finished = ? WHERE id = ?", (time.time(), job.id))
                elif job.signal is JobSignal.PAUSE:
                    db.execute("UPDATE jobs SET state = 'paused', signal = '' WHERE id = ?", (job.id,))
                elif job.attempts >= ATTEMPTS:
                    db.execute(
                        "UPDATE jobs SET state = 'failed', finished = ?, error = ?, advice = ? WHERE id = ?",
                        (time.time(), f"The worker ended {job.attempts} times while it was at this job.",
                         "The system may have run out of memory: ask for a smaller size, then retry.", job.id),
                    )  # fmt: skip
                else:
                    db.execute("UPDATE jobs SET state = 'queued', priority = 1 WHERE id = ?", (job.id,))
        return found

    # ---- a job that runs ----

    def set_progress(self, job_id: str, progress: Progress) -> JobSignal:
        """Note how far a job is; returns what somebody wants of it."""
        with self._connect() as db:
            row = db.execute("UPDATE jobs SET progress = ? WHERE id = ? RETURNING signal",
                             (json.dumps(asdict(progress)), job_id)).fetchone()  # fmt: skip
        return JobSignal(row["signal"]) if row else JobSignal.CANCEL

    def update_result(self, job_id: str, **result: object) -> None:
        """Something new is to be seen: files of its folder, `result`, which is added to what is known."""
        with self._changing() as db:
            job = self._one(db, job_id)
            if job is not None:
                db.execute("UPDATE jobs SET revision = revision + 1, attempts = 0, result = ? WHERE id = ?",
                           (json.dumps({**job.result, **result}), job_id))  # fmt: skip

    def note(self, job_id: str, text: str) -> None:
        """Tell the user something about the job; the same thing once."""
        with self._changing() as db:
            job = self._one(db, job_id)
            if job is not None and text not in job.notes:
                db.execute("UPDATE jobs SET notes = ? WHERE id = ?", (json.dumps([*job.notes, text]), job_id))

    def finish(self, job_id: str, state: JobState, error: str = "", advice: str = "") -> None:
        """A running job is over, is paused, or goes back into the queue, first."""
        finished = time.time() if state.ended else None
        with self._connect() as db:
            db.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, advice = ?, signal = '', priority = ? "
                "WHERE id = ? AND state = 'running'",
                (state, finished, error, advice, state is JobState.QUEUED, job_id),
            )

    # ---- the history ----

    def get(self, job_id: str) -> Job | None:
        """The job of that id, or None."""
        if not is_id(job_id):
            return None
        with self._connect() as db:
            return self._one(db, job_id)

    @staticmethod
    def _one(db: sqlite3.Connection, job_id: str) -> Job | None:
        row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def find(self, *, owner: str | None = None, kinds: Sequence[JobKind] = (), states: Sequence[JobState] = (),
             search: str = "", favorites: bool = False, limit: int = 60, offset: int = 0) -> list[Job]:
        """Jobs, newest first. Each word of `search` must be in the title or the settings."""
        where: list[str] = ["1"]
        values: list[Any] = []
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        for column, wanted in ("kind", kinds), ("state", states):
            if wanted:
                where.append(f"{column} IN ({', '.join('?' * len(wanted))})")
                values += wanted
        for word in search.split():
            escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
            where.append("(title LIKE ? ESCAPE '\\' OR params LIKE ? ESCAPE '\\')")
            values += [f"%{escaped}%"] * 2
        if favorites:
            where.append("favorite")
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ? OFFSET ?"
        with self._connect() as db:
            return [_job(row) for row in db.execute(query, (*values, limit, offset))]

    def set_favorite(self, job_id: str, favorite: bool) -> None:
        """A favorite is never deleted to make room."""
        with self._connect() as db:
            db.execute("UPDATE jobs SET favorite = ? WHERE id = ?", (favorite, job_id))

    def delete(self, job_id: str) -> bool:
        """Forget a job; a running one is kept and False returned."""
        with self._connect() as db:
            return db.execute("DELETE FROM jobs WHERE id = ? AND state != 'running'", (job_id,)).rowcount > 0

    # ---- values by name ----

    def get_value(self, name: str, default: Any = None) -> Any:
        """What was last noted under that name."""
        with self._connect() as db:
            row = db.execute("SELECT value FROM key_values WHERE name = ?", (name,)).fetchone()
        return json.loads(row["value"]) if row else default

    def set_value(self, name: str, value: Any) -> None:
        with self._connect() as db:
            db.execute("INSERT OR REPLACE INTO key_values VALUES (?, ?)", (name, json.dumps(value)))


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"], kind=JobKind(row["kind"]), owner=row["owner"], state=JobState(row["state"]),
        params=json.loads(row["params"]), title=row["title"], position=row["position"], created=row["created"],
        started=row["started"], finished=row["finished"], progress=Progress(**json.loads(row["progress"])),
        signal=JobSignal(row["signal"]), revision=row["revision"], result=json.loads(row["result"]),
        notes=tuple(json.loads(row["notes"])), error=row["error"], advice=row["advice"],
        favorite=bool(row["favorite"]), priority=bool(row["priority"]), attempts=row["attempts"], parent=row["parent"],
    )  # fmt: skip
