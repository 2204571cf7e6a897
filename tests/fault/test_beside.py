"""What lies beside the database, and is not its own, or is what a kill left there."""

import contextlib
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from carserver.config import Settings
from carserver.stores import inspection, recovery, rows, salvage, schema, slowcheck
from carserver.stores.schema import StorageError
from tests.unit.storing import create, event, opened

LARGE = Settings(check_bytes=1)  # nothing is looked at but what always is


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name)}


def runs(path: Path) -> int:
    """How many there are, once it is opened."""
    with contextlib.closing(recovery.open_database(path, LARGE).connection) as connection:
        count: int = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    return count


def half_made(path: Path) -> None:
    """The database, and the journal, that a kill leaves in the middle of the very first change."""
    source = path.with_name("source")
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("CREATE TABLE large (value BLOB)")
        connection.execute("DROP TABLE large")
        connection.execute("PRAGMA cache_size = 1")  # so that the file is written before the change is complete
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE large (value BLOB)")
        for _ in range(50):
            connection.execute("INSERT INTO large VALUES (zeroblob(3000))")
        for suffix in ("", "-journal"):
            shutil.copy(inspection.beside(source, suffix), inspection.beside(path, suffix))
    assert path.stat().st_size > source.stat().st_size
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        schema.open_reader(path)


def test_a_kill_while_the_file_was_made_does_not_keep_the_next_start_from_it(tmp_path: Path) -> None:
    path = tmp_path / "carserver.db"
    half_made(path)
    assert runs(path) == 0
    assert files(path).keys() == {path.name}


def test_a_journal_goes_with_the_database_that_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "carserver.db"
    path.write_bytes(b"SQLite format 3")
    inspection.beside(path, "-journal").write_bytes(b"of that one")
    assert runs(path) == 0
    (aside,) = tmp_path.glob("carserver.db.damaged-*-journal")
    assert aside.read_bytes() == b"of that one"
    assert files(path).keys() == {path.name, aside.name, aside.name.removesuffix("-journal")}


# A copy, and a log.


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder for what is copied from."""
    folder = tmp_path / "made"
    folder.mkdir()
    return folder


async def backed_up(folder: Path) -> tuple[Path, Path]:
    """A backup of one run, and the log of a database that has gone on to three, as a kill leaves it."""
    async with opened(folder / "source.db") as store:
        await store.submit(create("run-0"))
        await store.store.backup(str(folder / "backup"))
        for number in (1, 2):
            await store.submit(create(f"run-{number}"))
            await store.append(f"run-{number}", event(0))
        shutil.copy(folder / "source.db-wal", folder / "log")
    return folder / "backup", folder / "log"


async def test_a_backup_that_is_put_beside_the_log_of_another_database_is_refused_and_neither_is_touched(
    tmp_path: Path, made: Path
) -> None:
    backup, log = await backed_up(made)
    path = tmp_path / "carserver.db"
    shutil.copy(backup, path)
    shutil.copy(log, inspection.beside(path, "-wal"))
    before = files(path)
    with pytest.raises(StorageError, match="the log beside it is of the database that was there before: move "):
        recovery.open_database(path, Settings())
    assert files(path) == before
    inspection.beside(path, "-wal").unlink()
    assert runs(path) == 1


class Cut(Exception):
    """The daemon is gone."""


class Renewing:
    """A connection whose daemon is gone before its first checkpoint."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.create_function = connection.create_function
        self._connection = connection

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if "wal_checkpoint" in sql:
            raise Cut
        return self._connection.execute(sql, *values)


async def test_a_kill_when_a_backup_is_used_for_the_first_time_leaves_a_log_that_is_its_own(
    tmp_path: Path, made: Path
) -> None:
    backup, log = await backed_up(made)
    source, path = tmp_path / "used.db", tmp_path / "carserver.db"
    shutil.copy(backup, source)
    with contextlib.closing(schema.open_writer(source, synchronous="FULL")) as connection:
        with pytest.raises(Cut):
            rows.renew_epochs(Renewing(connection))  # type: ignore[arg-type]
        epochs = connection.execute("SELECT epoch FROM runs").fetchall()
        for suffix in ("", "-wal"):
            shutil.copy(inspection.beside(source, suffix), inspection.beside(path, suffix))
    with contextlib.closing(recovery.open_database(path, LARGE).connection) as connection:
        assert connection.execute("SELECT epoch FROM runs").fetchall() == epochs
    # Nothing is left that another log could be mistaken for later.
    shutil.copy(backup, path)
    shutil.copy(log, inspection.beside(path, "-wal"))
    with pytest.raises(StorageError, match="is a copy that was put in place"):
        recovery.open_database(path, LARGE)


async def test_a_backup_in_use_says_no_longer_that_it_is_one(tmp_path: Path, made: Path) -> None:
    backup, _ = await backed_up(made)
    path = tmp_path / "carserver.db"
    shutil.copy(backup, path)
    assert runs(path) == 1
    with contextlib.closing(schema.open_reader(path)) as connection:
        assert (rows.read_meta(connection, rows.COPIED), rows.read_meta(connection, rows.RENEWED)) == (None, None)


def test_a_database_that_is_a_link_is_refused_for_its_log_is_beside_what_it_points_to(tmp_path: Path) -> None:
    real, path = tmp_path / "real.db", tmp_path / "carserver.db"
    assert runs(real) == 0
    path.symlink_to(real)
    before = real.read_bytes()
    with pytest.raises(StorageError, match="is a symbolic link"):
        recovery.open_database(path, Settings())
    assert path.is_symlink()
    assert real.read_bytes() == before


# What is damage, and what is not.


async def test_a_backup_with_a_text_that_is_no_utf_8_any_more_is_carried_over_but_for_that_run(tmp_path: Path) -> None:
    path = tmp_path / "carserver.db"
    async with opened(tmp_path / "source.db") as store:
        await store.submit(create("broken", agent_id="a secret"))
        await store.submit(create("sound"))
        await store.store.backup(str(path))
    path.write_bytes(path.read_bytes().replace(b"a secret", b"a secre\xd4"))
    assert runs(path) == 1


class Failing(sqlite3.Connection):
    """A source whose disk does not give an event this once."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if "FROM events WHERE" in sql:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
            raise error
        return super().execute(sql, *values)


async def test_a_run_that_the_disk_does_not_give_while_a_file_is_set_aside_is_not_left_behind_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "carserver.db"
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", event(0))
        await store.submit(create("broken"))
        store.writing.execute("UPDATE texts SET checksum = 0 WHERE no = 2")
    before = files(path)
    open_damaged = salvage._open_damaged

    def failing(source: Path) -> sqlite3.Connection:
        open_damaged(source).close()
        return sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, isolation_level=None, factory=Failing)

    with monkeypatch.context() as patched:
        patched.setattr(salvage, "_open_damaged", failing)
        with pytest.raises(StorageError, match="disk I/O error; see that its disk works; it was not touched"):
            recovery.open_database(path, Settings())
    assert files(path) == before
    recovery.open_database(path, Settings()).connection.close()
    assert runs(path) == 1


# Threads beside the work.


class Walking:
    """A connection whose one statement does not end, and which asks nobody, as a check of a large tree does."""

    def __init__(self) -> None:
        self.began, self._interrupted = threading.Event(), threading.Event()

    def set_progress_handler(self, *_: object) -> None:
        pass

    def execute(self, _: str) -> None:
        self.began.set()
        self._interrupted.wait()
        raise sqlite3.OperationalError("interrupted")

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        pass


def test_the_check_beside_the_work_ends_when_it_is_told_to_though_it_is_in_the_middle_of_a_large_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    walking = Walking()
    monkeypatch.setattr(slowcheck, "open_reader", lambda _: walking)
    check = slowcheck.SlowCheck(tmp_path / "carserver.db", Settings(check_after_s=0.001), lambda _: None)
    check.start()
    assert walking.began.wait(10)
    check.stop()
    assert check.done.is_set()
    assert not caplog.records


def test_a_log_that_a_reader_let_grow_shrinks_again_when_the_reader_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_LOG_BYTES", 64 * 1024)
    path = tmp_path / "carserver.db"
    log = inspection.beside(path, "-wal")
    with contextlib.closing(schema.open_writer(path, synchronous="NORMAL")) as connection:

        def write() -> None:
            connection.execute("REPLACE INTO meta VALUES ('large', ?)", ("x" * 100_000,))
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

        with contextlib.closing(schema.open_reader(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM meta").fetchall()
            for _ in range(10):
                write()
        grown = log.stat().st_size
        write()  # what is left of it is written back
        write()  # and it begins anew
        assert log.stat().st_size < grown / 5
