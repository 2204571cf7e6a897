"""The tables, how the file is opened, and how it moves from one version to the next.

One row per event, in the order of its key: the run's number and the sequence in one integer, so that a page of a log is
one range of one tree. What changes with every append is small and apart from the texts that may be 256 KiB long.
"""

import contextlib
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import msgspec

SEQUENCE_BITS = 24
"""A run's events have the keys `no << SEQUENCE_BITS` and on: room for the 1,000,000 of the contract and for more."""

_APPLICATION_ID = 0x63617273  # "cars": what `file` and we know our database by
_BUSY_S = 5.0

_MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE runs (
        no INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        session_id TEXT NOT NULL,
        agent_id TEXT NOT NULL,
        parent_run_id TEXT,
        epoch TEXT NOT NULL,
        key_digest BLOB,
        created_at_ms INTEGER NOT NULL,
        status INTEGER NOT NULL,
        event_count INTEGER NOT NULL,
        updated_at_ms INTEGER NOT NULL,
        ended_at_ms INTEGER,
        last_at_ms INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        endings INTEGER NOT NULL
    );
    CREATE INDEX runs_by_time ON runs (created_at_ms);
    CREATE INDEX runs_by_owner ON runs (owner, created_at_ms);
    CREATE INDEX runs_by_session ON runs (session_id, created_at_ms);
    CREATE INDEX runs_by_agent ON runs (agent_id, created_at_ms);
    CREATE INDEX runs_by_parent ON runs (parent_run_id, created_at_ms) WHERE parent_run_id IS NOT NULL;
    CREATE INDEX runs_by_status ON runs (status, created_at_ms);
    CREATE TABLE texts (
        no INTEGER PRIMARY KEY,
        prompt TEXT NOT NULL,
        outcome_description TEXT,
        metadata BLOB,
        result_text TEXT,
        error TEXT,
        cancel_reason TEXT,
        interrupted_reason TEXT
    );
    CREATE TABLE events (
        place INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        status INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        event BLOB NOT NULL
    );
    CREATE TABLE batches (
        no INTEGER NOT NULL,
        batch_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        first_sequence INTEGER NOT NULL,
        count INTEGER NOT NULL,
        status INTEGER NOT NULL,
        PRIMARY KEY (no, batch_id)
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE runs ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE texts ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE batches ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    UPDATE runs SET log_bytes = (
        SELECT coalesce(sum(length(event)), 0) FROM events WHERE place >= no << 24 AND place < (no + 1) << 24
    );
    UPDATE runs SET checksum = row_checksum(
        no, id, owner, session_id, agent_id, parent_run_id, epoch, key_digest, created_at_ms, status, event_count,
        updated_at_ms, ended_at_ms, last_at_ms, revision, endings, log_bytes
    );
    UPDATE texts SET checksum = row_checksum(
        no, prompt, outcome_description, metadata, result_text, error, cancel_reason, interrupted_reason
    );
    UPDATE batches SET checksum = row_checksum(no, batch_id, digest, first_sequence, count, status);
    CREATE INDEX runs_by_end ON runs (ended_at_ms) WHERE ended_at_ms IS NOT NULL;
    CREATE TABLE dropped (no INTEGER PRIMARY KEY);
    """,
)
"""Each brings the file from the version of its place to the next. A released one is never changed."""

VERSION = len(_MIGRATIONS)


class StorageError(Exception):
    """The database cannot be used; the message says why and what to do."""


def row_checksum(*values: Any) -> int:
    """Of the values of a row, in the order of its columns: one that changed, or changed places, shows."""
    return zlib.crc32(msgspec.msgpack.encode(values))


def open_writer(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """The one connection that writes and checkpoints; makes or migrates the file.

    Args:
        path: The database file.
        synchronous: `FULL` (acknowledged means on disk) or `NORMAL` (through a kill).

    Raises:
        StorageError: not ours, newer than we are, or damaged.
    """
    connection: sqlite3.Connection | None = None
    try:
        with contextlib.suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)  # SQLite gives the files beside it the same mode
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        version = _check(connection, path)  # before anything is changed: the journal mode stays with the file
        if version == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # so that what is deleted can be given back
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        # By hand: a checkpoint that fails within a commit is not told, and a commit would wait for it.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        _migrate(connection, version)
        path.chmod(0o600)
    except (sqlite3.DatabaseError, OSError, StorageError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot open {path}: {error}; move the file away, or restore a backup of it") from error
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads. It must never checkpoint: before SQLite 3.51.3 that takes one connection alone."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = 1")
    # A first read opens all of its files: later there may be no descriptors left for them.
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    return connection


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a file that is ours; 0 for an empty one."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if tables and application != _APPLICATION_ID:
        raise StorageError(f"{path} is a database of another program; choose another --state-dir")
    if version > VERSION:
        raise StorageError(
            f"{path} has schema version {version}, this carserver knows {VERSION}: use the newer carserver"
        )
    return version


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    if version == VERSION:
        return
    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    # executescript would commit what is open: the statements are run one by one, in one transaction.
    connection.execute("BEGIN IMMEDIATE")
    for script in _MIGRATIONS[version:]:
        for statement in script.split(";"):
            if statement.strip():
                connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {VERSION:d}")
    connection.execute("COMMIT")
