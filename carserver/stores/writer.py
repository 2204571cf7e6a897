"""The one writer thread. Commands that wait share a transaction; what it commits is handed back in the log's order.

One event's walk: begin immediate; per command a savepoint and its pure `apply`; the rows; commit, which is the fsync;
then the loop is told. A refused command spoils no neighbour. What fails in storage is rolled back and said.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.cache import SizedCache
from carserver.core.commands import Applied, Command
from carserver.core.runs import CODES, Head
from carserver.protocol.errors import ErrorKind, RpcError, unavailable
from carserver.protocol.runs import Snapshot
from carserver.stores.rows import checksum, place, read_batch, read_head

if TYPE_CHECKING:
    from asyncio import Future

log = logging.getLogger("carserver.storage")

_FSYNC_FAILED = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC}
_COMMIT_BYTES = 16 * 1024  # that a transaction takes in the write-ahead log beside its events, at the least
_TEXTS = ("prompt", "outcome_description", "metadata", "result_text", "error", "cancel_reason", "interrupted_reason")

_REPLACE_TEXTS = "REPLACE INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


class Job(NamedTuple):
    """A command on its way through the writer; `future` is the caller's, and only the loop touches it."""

    future: "Future[Any]"
    command: Command
    by: Attendant | None


class Outcome(NamedTuple):
    """What became of a job."""

    job: Job
    result: Applied | Exception


class Writer:
    """Applies commands.

    Args:
        connection: The one that writes; the writer closes it.
        settings: The bounds of a commit and of the heads it keeps.
        deliver: Called in the writer's thread with the outcomes of one commit.
        fatal: Called in the writer's thread when an fsync failed: nothing may be acknowledged any more.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        settings: Settings,
        deliver: Callable[[Sequence[Outcome]], None],
        fatal: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._deliver = deliver
        self._fatal = fatal
        self._heads: SizedCache[str, Head] = SizedCache(settings.writer_heads, settings.writer_heads_bytes)
        self._stored: dict[str, Head] = {}  # the heads that this transaction changed, as their rows are
        self._new: dict[str, Head] = {}  # and as their rows will be
        self._last_no: int = connection.execute("SELECT coalesce(max(no), 0) FROM runs").fetchone()[0]
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._failed = False
        self._unchecked_bytes = 0  # written since the last checkpoint, about
        self.problem: str | None = None  # why storage takes no writes; None while it does

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def put(self, job: Job) -> None:
        """One more job; whoever calls bounds how many wait."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Finishes what waits and closes the connection; blocks until that is done."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            jobs, going = self._gather()
            if jobs:
                self._commit(jobs)
            elif going and self.problem is not None and not self._failed:
                self._probe()
        if not self._failed:
            self._connection.close()

    def _gather(self) -> tuple[list[Job], bool]:
        """What waits, within the bounds of one commit; whether to go on after it."""
        jobs: list[Job] = []
        size = 0
        try:
            job = self._jobs.get(timeout=None if self.problem is None else self._settings.probe_s)
            while job is not None:
                jobs.append(job)
                size += job.command.size
                if len(jobs) >= self._settings.commit_commands or size >= self._settings.commit_bytes:
                    return jobs, True
                job = self._jobs.get_nowait()
        except Empty:
            return jobs, True
        return jobs, False

    def _commit(self, jobs: list[Job]) -> None:
        if self._failed:
            self._deliver([Outcome(job, _fsync_failed()) for job in jobs])
            return
        last_no = self._last_no
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = [Outcome(job, self._apply(job.command)) for job in jobs]
            self._write_heads()
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it was, the transaction is undone and every caller told
            self._last_no = last_no
            self._roll_back(error, jobs)
            return
        for run_id, head in self._new.items():
            self._heads.put(run_id, head, head.size)
        self._clear()
        if self.problem is not None:
            log.warning("storage takes writes again")
            self.problem = None
        self._deliver(outcomes)
        self._unchecked_bytes += _COMMIT_BYTES + sum(job.command.size for job in jobs)
        if self._unchecked_bytes >= self._settings.wal_bytes:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Writes the log back into the database, as far as no reader stands in the way.

        After the answers of its commit have gone out; what comes meanwhile waits for it.
        """
        self._unchecked_bytes = 0
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            if not self._is_fatal(error):
                log.warning("the write-ahead log could not be written back, it is tried again: %s", error)

    def _apply(self, command: Command) -> Applied | Exception:
        """One command within the transaction: what it came to, or its refusal."""
        head = self._head(command.run_id)
        batch_id = command.batch_id
        prior = read_batch(self._connection, head, batch_id) if batch_id is not None and head is not None else None
        try:
            applied = command.apply(head, prior)
        except Exception as refusal:  # noqa: BLE001 - a refusal, or a defect: nothing is written, so its own in any case
            return refusal
        if applied.head is head:
            return applied
        self._connection.execute("SAVEPOINT command")
        try:
            applied = self._write(applied)
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:
            self._connection.execute("ROLLBACK TO command")
            log.exception("a command could not be stored", extra={"run_id": command.run_id})
            return unavailable(f"storage refused it: {error}")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("RELEASE command")
        self._stored.setdefault(command.run_id, head or applied.head)
        self._new[command.run_id] = applied.head
        return applied

    def _head(self, run_id: str) -> Head | None:
        head = self._new.get(run_id) or self._heads.get(run_id)
        if head is None:
            head = read_head(self._connection, run_id)
            if head is not None:
                self._heads.put(run_id, head, head.size)
        return head

    def _write(self, applied: Applied) -> Applied:
        """The rows of one command, but for its head's, which is written once per transaction."""
        head = applied.head
        if head.no == 0:
            self._last_no += 1
            head = replace(head, no=self._last_no)
            applied = applied._replace(head=head)
            self._insert(head)
        if applied.entries:
            rows = []
            for sequence, at_ms, status, raw in applied.entries:
                key = place(head.no, sequence)
                rows.append((key, at_ms, status, checksum(key, at_ms, status, raw), raw))
            self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
        if applied.batch is not None:
            batch_id, digest, answer = applied.batch
            self._connection.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)",
                (head.no, batch_id, digest, answer.first_sequence, answer.count, CODES[answer.status]),
            )
        return applied

    def _insert(self, head: Head) -> None:
        run = head.run
        self._connection.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                head.no,
                run.id,
                head.owner,
                run.session_id,
                run.agent_id,
                run.parent_run_id,
                run.epoch,
                head.key_digest,
                run.created_at_ms,
                *_changing(head),
            ),
        )
        self._connection.execute(_REPLACE_TEXTS, (head.no, *_texts(run)))

    def _write_heads(self) -> None:
        for run_id, head in self._new.items():
            stored = self._stored[run_id]
            if head is stored:
                continue  # created in this transaction, and no more
            self._connection.execute(
                "UPDATE runs SET status = ?, event_count = ?, updated_at_ms = ?, ended_at_ms = ?, last_at_ms = ?,"
                " revision = ?, endings = ? WHERE no = ?",
                (*_changing(head), head.no),
            )
            if _texts(stored.run) != _texts(head.run):
                self._connection.execute(_REPLACE_TEXTS, (head.no, *_texts(head.run)))

    def _clear(self) -> None:
        self._stored.clear()
        self._new.clear()

    def _roll_back(self, error: Exception, jobs: list[Job]) -> None:
        """Nothing of the transaction is left; every caller is told what that means."""
        if self._is_fatal(error):
            self._deliver([Outcome(job, _fsync_failed()) for job in jobs])
            return
        why = str(error)
        if not isinstance(error, sqlite3.Error):
            log.error("a defect in the writer", exc_info=error)
            why = "a defect of the daemon; its log has the details"  # nothing of the exception is for peers
        elif self.problem is None:
            log.error("storage fails: %s", error)
        self.problem = why
        self._undo()
        for run_id in self._stored:
            self._heads.pop(run_id)
        self._clear()
        refusal = unavailable(f"storage fails: {why}; nothing was stored")
        self._deliver([Outcome(job, refusal) for job in jobs])

    def _is_fatal(self, error: Exception) -> bool:
        """A failed fsync: what the disk has is not known any more, and the next one would lie. Says so, once."""
        if getattr(error, "sqlite_errorcode", None) not in _FSYNC_FAILED:
            return False
        self._failed = True
        self.problem = f"fsync failed: {error}"
        self._fatal(str(error))
        return True

    def _undo(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            log.error("rollback failed: %s", error)  # noqa: TRY400 - the failure that led here has its trace already

    def _probe(self) -> None:
        """Storage failed and nobody writes: sees whether it would work again."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("REPLACE INTO meta VALUES ('probe', '')")
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if not self._is_fatal(error):
                self.problem = str(error)
                self._undo()
        else:
            log.warning("storage takes writes again")
            self.problem = None


def _changing(head: Head) -> tuple[int | None, ...]:
    run = head.run
    return (
        CODES[run.status],
        run.event_count,
        run.updated_at_ms,
        run.ended_at_ms,
        head.last_at_ms,
        head.revision,
        head.endings,
    )


def _texts(run: Snapshot) -> tuple[object, ...]:
    return tuple(bytes(run.metadata) if name == "metadata" and run.metadata else getattr(run, name) for name in _TEXTS)


def _fsync_failed() -> RpcError:
    return RpcError(
        ErrorKind.UNAVAILABLE,
        "the disk did not confirm a write (fsync failed): whether this was stored is unknown; the daemon stops",
        outcome="unknown",
    )
