"""The tables, how the file is opened, and how it moves from one version to the next.

One row per event, in the order of its key: the run's number and the sequence in one integer, so that a page of a log is
one range of one tree. What changes with every append is small and apart from the texts that may be 256 KiB long.
"""

import contextlib
import errno
import logging
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import msgspec

from carserver.stores.damage import Unreadable, in_words, is_damage

log = logging.getLogger("carserver.storage")

SEQUENCE_BITS = 24
"""A run's events have the keys `no << SEQUENCE_BITS` and on: room for the 1,000,000 of the contract and for more."""

_APPLICATION_ID = 0x63617273  # "cars": what `file` and we know our database by
_OURS = {"meta", "runs", "texts", "events", "batches"}  # since version 1
_BUSY_S = 5.0
_LOG_BYTES = 64 * 1024 * 1024  # to which a write-ahead log shrinks that a backup, or a reader, let grow
_NO_FILES_ELSEWHERE = "PRAGMA temp_store = MEMORY"  # else in /var/tmp, which may be full or read-only: a commit fails

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
    CREATE TABLE imports (
        no INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        run BLOB NOT NULL,
        cursor INTEGER NOT NULL,
        last_at_ms INTEGER NOT NULL,
        status INTEGER,
        log_bytes INTEGER NOT NULL
    );
    CREATE TABLE outputs (
        no INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        task_id TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        producer_agent TEXT NOT NULL,
        artifact TEXT,
        run_id TEXT,
        created_at_ms INTEGER NOT NULL,
        key TEXT,
        key_digest BLOB,
        event BLOB NOT NULL,
        parent_refs BLOB NOT NULL,
        size INTEGER,
        sha256 TEXT,
        utf8 INTEGER,
        fingerprint BLOB,
        value_checksum INTEGER,
        checksum INTEGER NOT NULL,
        value BLOB
    );
    CREATE INDEX outputs_by_task ON outputs (task_id);
    CREATE INDEX outputs_by_attempt ON outputs (task_id, attempt);
    CREATE INDEX outputs_by_producer ON outputs (producer_agent);
    CREATE INDEX outputs_by_producer_task ON outputs (producer_agent, task_id);
    CREATE INDEX outputs_by_producer_attempt ON outputs (producer_agent, task_id, attempt);
    CREATE INDEX outputs_by_artifact ON outputs (artifact) WHERE artifact IS NOT NULL;
    CREATE INDEX outputs_by_artifact_task ON outputs (artifact, task_id) WHERE artifact IS NOT NULL;
    CREATE INDEX outputs_by_artifact_attempt ON outputs (artifact, task_id, attempt) WHERE artifact IS NOT NULL;
    CREATE INDEX outputs_by_run ON outputs (run_id) WHERE run_id IS NOT NULL;
    CREATE INDEX outputs_by_age ON outputs (created_at_ms) WHERE run_id IS NULL;
    CREATE UNIQUE INDEX outputs_by_key ON outputs (owner, key) WHERE key IS NOT NULL;
    """,
    """
    ALTER TABLE outputs RENAME COLUMN utf8 TO flags;
    CREATE TABLE handles (
        handle TEXT PRIMARY KEY,
        run_id TEXT NOT NULL,
        tool TEXT NOT NULL,
        checksum INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX handles_by_run ON handles (run_id);
    CREATE TABLE tool_keys (
        owner TEXT NOT NULL,
        method TEXT NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        at_ms INTEGER NOT NULL,
        handle TEXT NOT NULL,
        checksum INTEGER NOT NULL,
        PRIMARY KEY (owner, method, key)
    ) WITHOUT ROWID;
    CREATE INDEX tool_keys_by_time ON tool_keys (at_ms);
    """,
    """
    ALTER TABLE runs ADD COLUMN turns INTEGER NOT NULL DEFAULT 0;
    UPDATE runs SET checksum = row_checksum(
        no, id, owner, session_id, agent_id, parent_run_id, epoch, key_digest, created_at_ms, status, event_count,
        updated_at_ms, ended_at_ms, last_at_ms, revision, endings, log_bytes, turns
    ) WHERE checksum = row_checksum(
        no, id, owner, session_id, agent_id, parent_run_id, epoch, key_digest, created_at_ms, status, event_count,
        updated_at_ms, ended_at_ms, last_at_ms, revision, endings, log_bytes
    );
    ALTER TABLE texts ADD COLUMN outcome BLOB;
    UPDATE texts SET checksum = row_checksum(
        no, prompt, outcome_description, metadata, result_text, error, cancel_reason, interrupted_reason, outcome
    ) WHERE checksum = row_checksum(
        no, prompt, outcome_description, metadata, result_text, error, cancel_reason, interrupted_reason
    );
    ALTER TABLE imports ADD COLUMN turns INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE receipts (
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        no INTEGER NOT NULL,
        digest BLOB NOT NULL,
        final INTEGER NOT NULL,
        receipt BLOB NOT NULL,
        checksum INTEGER NOT NULL,
        PRIMARY KEY (owner, key)
    ) WITHOUT ROWID;
    CREATE INDEX receipts_by_run ON receipts (no);
    CREATE TABLE approvals (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL,
        resolved_at_ms INTEGER,
        approval BLOB NOT NULL,
        checksum INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX approvals_by_time ON approvals (resolved_at_ms, created_at_ms);
    """,
)
"""Each brings the file from the version of its place to the next. A released one is never changed."""

VERSION = len(_MIGRATIONS)


_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE}


class StorageError(Exception):
    """The database cannot be used; the message says why and what to do."""


class DamagedFile(Exception):
    """The database is ours, and is not what was written; the message says what was found."""


def cannot_open(path: Path, error: Exception) -> StorageError | DamagedFile:
    """What to raise where opening the file met this."""
    if is_damage(error):
        return DamagedFile(in_words(error))
    code = getattr(error, "sqlite_errorcode", None)
    if code in _NO_ROOM or (isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}):
        return StorageError(f"cannot open {path}: {error}; make room on its disk")
    return StorageError(f"cannot open {path}: {error}; see that its disk works, and that the file may be written")


def row_checksum(*values: Any) -> int:
    """Of the values of a row, in the order of its columns: one that changed, or changed places, shows."""
    return zlib.crc32(msgspec.msgpack.encode(values))


def open_writer(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """The one connection that writes and checkpoints; makes or migrates the file.

    Args:
        path: The database file.
        synchronous: `FULL` (acknowledged means on disk) or `NORMAL` (through a kill).

    Raises:
        StorageError: not ours, newer than we are, or the disk refuses; nothing was changed.
        DamagedFile: it is damaged; nothing was changed.
    """
    connection: sqlite3.Connection | None = None
    try:
        with contextlib.suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)  # SQLite gives the files beside it the same mode
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        version = check_version(connection, path)  # before anything is changed: the journal mode stays with the file
        if version == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # so that what is deleted can be given back
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        # By hand: a checkpoint that fails within a commit is not told, and a commit would wait for it.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES:d}")
        connection.execute(_NO_FILES_ELSEWHERE)
        _migrate(connection, version)
        path.chmod(0o600)
    except (*Unreadable, OSError, StorageError, DamagedFile) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, StorageError | DamagedFile):
            raise
        raise cannot_open(path, error) from error
    return connection


def open_new(path: Path) -> sqlite3.Connection:
    """An empty database that nobody uses yet, to be filled; what is in it is durable when its maker has synced it.

    Raises:
        FileExistsError, OSError, sqlite3.Error: there is none.
    """
    path.touch(mode=0o600, exist_ok=False)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = MEMORY")
    connection.execute("PRAGMA synchronous = OFF")
    _migrate(connection, 0)
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads. It must never checkpoint: before SQLite 3.51.3 that takes one connection alone."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = 1")
    connection.execute(_NO_FILES_ELSEWHERE)
    # A first read opens all of its files: later there may be no descriptors left for them.
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    return connection


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """The version of a file that is ours; 0 for an empty one.

    Raises:
        StorageError: it is another program's, or newer.
        DamagedFile: its header is none that we write.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = stored_schema(connection)
    if tables and application != _APPLICATION_ID:
        if tables.keys() >= _OURS:
            raise DamagedFile(f"it has our tables, and another program's id ({application:#x})")
        raise StorageError(f"{path} is a database of another program; choose another --state-dir")
    if version > VERSION:
        raise StorageError(
            f"{path} has schema version {version}, this carserver knows {VERSION}: use the newer carserver"
        )
    if version < 0 or bool(version) != bool(tables):
        raise DamagedFile(f"it has schema version {version}, and {len(tables)} tables and indexes")
    return version


def schema_of(version: int) -> dict[str, str | None]:
    """What stands in the file of this version, by name: each table and index, and how it was made."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _migrate(connection, 0, version)
        return stored_schema(connection)


def stored_schema(connection: sqlite3.Connection) -> dict[str, str | None]:
    """What `schema_of` says, of an open file."""
    return dict(connection.execute("SELECT name, sql FROM sqlite_schema"))


def _migrate(connection: sqlite3.Connection, version: int, to: int = VERSION) -> None:
    """One transaction, all of it or nothing; where it raises, whoever closes the connection undoes it."""
    if version == to:
        return
    if version:
        log.info("the database moves from schema version %d to %d", version, to)
    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    # executescript would commit what is open: the statements are run one by one, in one transaction.
    connection.execute("BEGIN IMMEDIATE")
    for script in _MIGRATIONS[version:to]:
        for statement in script.split(";"):
            if statement.strip():
                connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {to:d}")
    connection.execute("COMMIT")
