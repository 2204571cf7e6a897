"""The writer thread alone: commits and their bounds, refusals, failing storage, the end."""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.commands import Applied, Batch, Command, Create, Record
from carserver.core.edits import Edit
from carserver.core.principals import HOST, Principal
from carserver.core.runs import Entry, Head
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.stores import runrows, schema
from carserver.stores.rows import read_batch, read_entries, read_head
from carserver.stores.schema import open_writer
from carserver.stores.writer import Job, Outcome, Writer
from tests.unit.storing import create, event, held, other_connection, record, write_lock

COMMIT_S = 20.0
NOBODY: Any = None  # the writer only carries the future, it never touches it


class Driven:
    """A writer that is not started yet, so that a test decides what waits for it when it is."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.commits: SimpleQueue[list[Outcome]] = SimpleQueue()
        self.fatal: SimpleQueue[str] = SimpleQueue()
        self.connection = open_writer(path, synchronous="FULL")
        self.writer = Writer(self.connection, Settings(**settings), self._deliver, self.fatal.put, "boot")
        self._started = False

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        self.commits.put(list(outcomes))

    def put(self, *commands: Command | Edit) -> None:
        for command in commands:
            self.writer.put(Job(NOBODY, command, None))

    def start(self) -> None:
        self._started = True
        self.writer.start()

    def commit(self) -> list[Any]:
        """The outcomes of the next commit."""
        return [outcome.result for outcome in self.commits.get(timeout=COMMIT_S)]

    def one(self, command: Command) -> Any:
        """The answer of a command that is put alone; raises its refusal."""
        self.put(command)
        (result,) = self.commit()
        if isinstance(result, Exception):
            raise result
        return result.answer

    def head(self, run_id: str) -> Head | None:
        """As another connection sees it."""
        with other_connection(self.path) as connection:
            return read_head(connection, run_id)

    def events(self, run_id: str) -> list[bytes]:
        """As another connection sees them."""
        head = self.head(run_id)
        assert head is not None
        with other_connection(self.path) as connection:
            return [entry.raw for entry in read_entries(connection, head, 0, head.cursor)]

    def problem(self) -> str | None:
        return self.writer.problem

    def stop(self) -> None:
        if self._started:
            self.writer.stop()


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    driven = Driven(tmp_path / "test.db")
    yield driven
    driven.stop()


def refused(result: Applied | Exception) -> RpcError:
    assert isinstance(result, RpcError), result
    return result


def answered(result: Applied | Exception) -> Any:
    assert isinstance(result, Applied), result
    return result.answer


# One commit.


def test_what_waits_shares_one_commit_and_is_answered_in_its_order(driven: Driven) -> None:
    driven.put(create("run"), *[record("run", event(n)) for n in range(500)])
    driven.start()
    results = driven.commit()
    assert [answered(result).first_sequence for result in results[1:]] == list(range(500))
    assert driven.events("run") == [event(n).raw for n in range(500)]
    assert driven.commits.empty()


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [({"commit_commands": 4}, 0, [4, 4, 3]), ({"commit_bytes": 10_000}, 4000, [3, 2, 2, 2, 2])],
    ids=["commands", "bytes"],
)
def test_a_commit_takes_no_more_than_its_bounds(
    tmp_path: Path, settings: dict[str, int], size: int, expected: list[int]
) -> None:
    driven = Driven(tmp_path / "test.db", **settings)
    driven.put(create("run"), *[record("run", event(n, size)) for n in range(10)])
    driven.start()
    driven.stop()
    assert [len(driven.commits.get_nowait()) for _ in expected] == expected
    assert driven.commits.empty()


def test_one_refused_command_spoils_no_neighbour_in_the_same_commit(driven: Driven) -> None:
    driven.put(
        create("run"),
        record("run", event(0)),
        record("run", event(1), by=Principal("agent", "other")),
        record("run", event(2), expected_sequence=7),
        record("run", event(3), run_events=1),
        record("nowhere", event(4)),
        record("run", event(5), expected_sequence=1),
    )
    driven.start()
    results = driven.commit()
    kinds = [refused(result).kind for result in results[2:6]]
    assert kinds == [ErrorKind.NOT_FOUND, ErrorKind.CONFLICT, ErrorKind.LIMIT_EXCEEDED, ErrorKind.NOT_FOUND]
    assert [answered(results[at]).first_sequence for at in (1, 6)] == [0, 1]
    assert driven.events("run") == [event(0).raw, event(5).raw]


class Colliding(Record, frozen=True, kw_only=True):
    """Stores one entry that is new, and one whose place is taken."""

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        applied = super().apply(head, prior)
        (new,) = applied.entries
        return applied._replace(entries=[new, Entry(0, new.timestamp_ms, new.status, new.raw)])


class Defective(Record, frozen=True, kw_only=True):
    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        raise ZeroDivisionError("secret")


def test_a_command_that_the_database_refuses_leaves_nothing_and_spoils_no_neighbour(driven: Driven) -> None:
    wrong = Colliding(run_id="run", principal=create("run").principal, now_ms=0, events=[event(1)], run_events=9)
    driven.put(create("run"), record("run", event(0)), wrong, record("run", event(2)))
    driven.start()
    _, _, collided, after = driven.commit()
    assert refused(collided).kind is ErrorKind.UNAVAILABLE
    assert refused(collided).data == {"outcome": "not_done"}
    assert answered(after).first_sequence == 1
    assert driven.events("run") == [event(0).raw, event(2).raw]
    assert driven.problem() is None


def test_a_defect_in_one_command_is_its_own_and_spoils_no_neighbour(driven: Driven) -> None:
    wrong = Defective(run_id="run", principal=create("run").principal, now_ms=0, events=[event(1)], run_events=9)
    driven.put(create("run"), wrong, record("run", event(2)))
    driven.start()
    _, defect, after = driven.commit()
    assert isinstance(defect, ZeroDivisionError)
    assert answered(after).cursor == 1
    assert driven.problem() is None


def test_a_batch_sent_twice_in_one_commit_is_stored_once_and_with_other_events_refused(driven: Driven) -> None:
    batch = record("run", event(0), event(1), batch_id="b")
    driven.put(create("run"), batch, batch, record("run", event(2), batch_id="b"), record("run", event(3)))
    driven.start()
    _, first, again, other, after = driven.commit()
    assert answered(first) == answered(again)
    assert refused(other).data == {"reason": "batch_reused"}
    assert answered(after).first_sequence == 2
    assert driven.one(batch) == answered(first)  # and in a later commit, `cursor` and `status` being the batch's own
    with other_connection(driven.path) as connection:
        head = driven.head("run")
        assert head is not None
        kept = read_batch(connection, head, "b")
        assert kept is not None
        assert kept.answer == answered(first)
        assert read_batch(connection, head, "c") is None


def test_heads_that_the_writer_does_not_keep_are_read_again(tmp_path: Path) -> None:
    driven = Driven(tmp_path / "test.db", writer_heads=1)
    driven.start()
    for name in ("a", "b", "c"):
        driven.one(create(name))
    for number in range(3):
        for name in ("a", "b", "c"):
            assert driven.one(record(name, event(number))).first_sequence == number
    driven.stop()


def test_a_writer_on_an_old_file_goes_on_with_its_numbers_and_sequences(tmp_path: Path) -> None:
    for start, name in ((0, "a"), (1, "b")):
        driven = Driven(tmp_path / "test.db")
        driven.start()
        driven.one(create(name))
        assert driven.one(record("a", event(start))).first_sequence == start
        head = driven.head(name)
        assert head is not None
        assert head.no == start + 1
        driven.stop()


def test_stopping_finishes_what_waits_and_takes_the_write_ahead_log_back(tmp_path: Path) -> None:
    driven = Driven(tmp_path / "test.db")
    driven.put(create("run"), *[record("run", event(n)) for n in range(50)])
    driven.start()
    driven.stop()
    assert len(driven.events("run")) == 50
    assert not Path(f"{driven.path}-wal").exists()


def test_the_write_ahead_log_is_written_back_beyond_its_bytes_and_begins_anew(tmp_path: Path) -> None:
    driven = Driven(tmp_path / "test.db", wal_bytes=200_000)
    driven.start()
    driven.one(create("run"))
    largest = 0
    for number in range(200):
        driven.one(record("run", event(number, 20_000)))
        largest = max(largest, Path(f"{driven.path}-wal").stat().st_size)
    print(f"4 MB recorded, the log had {largest} bytes at most")
    assert largest < 600_000
    assert len(driven.events("run")) == 200
    driven.stop()


# Storage fails.


def fill(connection: sqlite3.Connection) -> int:
    """The disk is full, as far as SQLite can tell: the file cannot grow. What the bound was."""
    before: int = connection.execute("PRAGMA max_page_count").fetchone()[0]
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    return before


def test_a_full_disk_refuses_all_of_the_commit_reads_go_on_and_room_is_enough_to_resume(driven: Driven) -> None:
    driven.start()
    driven.one(create("run"))
    driven.one(record("run", event(0)))
    before = fill(driven.connection)
    first = held()
    driven.put(first)
    assert first.begun.wait(COMMIT_S)
    driven.put(record("run", event(1)), create("other"), record("run", event(2, 100_000)), record("run", event(3)))
    first.released.set()
    driven.commit()
    failed = [refused(result) for result in driven.commit()]
    assert len(failed) == 4
    for refusal in failed:
        assert refusal.kind is ErrorKind.UNAVAILABLE
        assert refusal.data == {"outcome": "not_done"}
        assert "full" in refusal.message
    assert len(driven.events("run")) == 1
    assert driven.head("other") is None

    driven.connection.execute(f"PRAGMA max_page_count = {before}")
    assert driven.one(record("run", event(9, 100_000))).first_sequence == 1  # the failed ones moved no head
    assert driven.problem() is None
    driven.one(create("other"))


def test_while_storage_fails_it_is_said_and_tried_until_it_works_though_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_BUSY_S", 0.01)
    driven = Driven(tmp_path / "test.db", probe_s=0.01)
    tried: SimpleQueue[str] = SimpleQueue()
    driven.start()
    driven.one(create("run"))
    driven.connection.set_trace_callback(tried.put)
    with write_lock(driven.path):
        with pytest.raises(RpcError, match="database is locked; nothing was stored") as refusal:
            driven.one(record("run", event(0)))
        assert refusal.value.data == {"outcome": "not_done"}
        assert driven.problem() == "database is locked"
        for _ in range(3):
            assert tried.get(timeout=COMMIT_S) == "BEGIN IMMEDIATE"
    while tried.get(timeout=COMMIT_S) != "COMMIT":  # a probe's
        pass
    assert driven.one(record("run", event(1))).first_sequence == 0
    assert driven.problem() is None
    driven.stop()


class FailingFsync:
    """The writer's connection, whose disk fails at the next commit, or at another statement."""

    def __init__(self, connection: sqlite3.Connection, code: int, at: str = "COMMIT") -> None:
        self._connection = connection
        self._code = code
        self._at = at

    def execute(self, sql: str, *args: Any) -> Any:
        if sql.startswith(self._at):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self._code
            raise error
        return self._connection.execute(sql, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC])
def test_after_a_failed_fsync_nothing_is_acknowledged_any_more_and_the_daemon_is_told_once(
    driven: Driven, code: int
) -> None:
    driven.start()
    driven.one(create("run"))
    driven.writer._connection = FailingFsync(driven.connection, code)  # type: ignore[assignment]
    for number in range(2):
        with pytest.raises(RpcError, match="fsync failed") as refusal:
            driven.one(record("run", event(number)))
        assert (refusal.value.kind, refusal.value.data) == (ErrorKind.UNAVAILABLE, {"outcome": "unknown"})
    assert driven.fatal.get(timeout=COMMIT_S) == "disk I/O error"
    assert driven.fatal.empty()
    assert driven.problem() == "fsync failed: disk I/O error"


@pytest.mark.parametrize(("code", "fatal"), [(sqlite3.SQLITE_IOERR_FSYNC, True), (sqlite3.SQLITE_IOERR_WRITE, False)])
def test_a_checkpoint_that_fails_harms_no_commit_but_a_failed_fsync_in_it_is_as_fatal_as_any(
    tmp_path: Path, code: int, fatal: bool
) -> None:
    driven = Driven(tmp_path / "test.db", wal_bytes=1)
    # Before it starts: the checkpoint comes behind the answers, and each commit has one.
    driven.writer._connection = FailingFsync(driven.connection, code, "PRAGMA wal_checkpoint")  # type: ignore[assignment]
    driven.put(create("run"), record("run", event(0)))
    driven.start()
    _, first = driven.commit()
    assert answered(first).first_sequence == 0  # it was committed before
    if fatal:
        assert driven.fatal.get(timeout=COMMIT_S) == "disk I/O error"
        with pytest.raises(RpcError, match="fsync failed"):
            driven.one(record("run", event(1)))
    else:
        assert driven.one(record("run", event(1))).first_sequence == 1
        assert driven.fatal.empty()
        assert driven.problem() is None
    driven.stop()


def test_another_io_error_is_no_failed_fsync(driven: Driven) -> None:
    driven.start()
    driven.one(create("run"))
    driven.writer._connection = FailingFsync(  # type: ignore[assignment]
        driven.connection, sqlite3.SQLITE_IOERR_WRITE
    )
    with pytest.raises(RpcError) as refusal:
        driven.one(record("run", event(0)))
    assert refusal.value.data == {"outcome": "not_done"}
    driven.writer._connection = driven.connection
    assert driven.one(record("run", event(1))).first_sequence == 0
    assert driven.fatal.empty()


def test_a_defect_outside_any_command_fails_the_commit_and_tells_peers_nothing_of_itself(
    driven: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven.start()
    driven.one(create("run"))

    def broken(*_: object) -> int:
        raise ZeroDivisionError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(runrows, "entry_row", broken)
        with pytest.raises(RpcError) as refusal:
            driven.one(record("run", event(0)))
    assert (refusal.value.kind, refusal.value.data) == (ErrorKind.UNAVAILABLE, {"outcome": "not_done"})
    assert "secret" not in refusal.value.message
    assert "secret" not in (driven.problem() or "")
    assert driven.one(record("run", event(1))).first_sequence == 0


def test_a_run_that_exists_is_not_created_anew(driven: Driven) -> None:
    driven.start()
    first = driven.one(create("run", prompt="first"))
    with pytest.raises(RpcError, match="idempotency_key"):
        driven.one(_keyed(create("run", prompt="second"), b"2"))
    assert driven.one(create("run", prompt="first")) == first
    with pytest.raises(RpcError):
        driven.one(record("run", event(0), by=HOST))


def _keyed(command: Create, digest: bytes) -> Create:
    head = command.head
    keyed = Head(
        no=0, owner=head.owner, run=head.run, revision=1, endings=0, last_at_ms=head.last_at_ms, key_digest=digest
    )
    return Create(run_id=command.run_id, principal=command.principal, now_ms=command.now_ms, head=keyed)
