"""The SQLite file of the jobs: its schema and its connections.

The processes of the server and its workers use it. Every call opens its own connection, which costs a tenth of a
millisecond and makes it safe in any thread. WAL lets the page read while a worker writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from odvae.utils.errors import UserError

VERSION = 5
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
    parent TEXT NOT NULL DEFAULT '',
    worker INTEGER
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE workers (number INTEGER PRIMARY KEY, status TEXT NOT NULL); -- JSON, of those of the server
CREATE TABLE served (owner TEXT PRIMARY KEY, at REAL NOT NULL);          -- when each owner last had a turn
CREATE TABLE key_values (name TEXT PRIMARY KEY, value TEXT NOT NULL);    -- JSON: options, the model, measured times
"""


class Database:
    """The SQLite file at `path`, created if it is missing."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with self.connect() as db:
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
                f"{path} is not a usable history ({error}). Move it away, or choose another --data-dir."
            ) from error
        if version not in (0, VERSION):
            raise UserError(f"{path} has format version {version}, but this program needs {VERSION}. Choose another "
                            "--data-dir.")

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """Open a connection that commits every statement."""
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            yield db
        finally:
            db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a connection in a transaction, which is rolled back on an error."""
        with self.connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
