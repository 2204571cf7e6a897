"""The one writer thread. Commands that wait share a transaction; what it commits is handed back in the log's order.

One event's walk: begin immediate; per command a savepoint and its pure `apply`; the rows; commit, which is the fsync;
then the loop is told. A refused command spoils no neighbour. What fails in storage is rolled back and said.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Applied, Command
from carserver.core.edits import Edit, Edited
from carserver.core.ports import Committed, Damaged, Done
from carserver.core.runs import Head
from carserver.protocol.errors import ErrorKind, RpcError, unavailable
from carserver.stores.damage import Unreadable, in_words, is_damage
from carserver.stores.runrows import RunRows
from carserver.stores.stored import StoredRows
from carserver.stores.sweep import Sweep

if TYPE_CHECKING:
    from asyncio import Future

T = TypeVar("T")

log = logging.getLogger("carserver.storage")

_FSYNC_FAILED = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC}
_MAY_PASS = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}  # primary codes: what there is can be read meanwhile
_COMMIT_BYTES = 16 * 1024  # that a transaction takes in the write-ahead log beside its events, at the least
_ROW_BYTES = 16 * 1024  # that a row of a run or an output takes there with its places in the indexes, about
_SHORT_S = 0.001


class Job(NamedTuple):
    """A command or an edit on its way through the writer; `future` is the caller's, and only the loop touches it."""

    future: "Future[Any]"
    command: Command | Edit
    by: Attendant | None


class Outcome(NamedTuple):
    """What became of a job; `before` is the head of a command's run before it."""

    job: Job
    result: Applied | Edited | Exception
    before: Head | None = None

    def committed(self) -> Committed | Done:
        """What is published of it."""
        if isinstance(self.job.command, Edit):
            return Done(self.job.command, cast("Edited", self.result), self.job.by)
        return Committed(self.job.command, cast("Applied", self.result), self.job.by, self.before)


class Writer:
    """Applies commands.

    Args:
        connection: The one that writes; the writer closes it.
        settings: The bounds of a commit and of the heads it keeps.
        deliver: Called in the writer's thread with the outcomes of one commit.
        fatal: Called in the writer's thread when an fsync failed: nothing may be acknowledged any more.
        boot_id: The daemon's, kept for the next one.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        settings: Settings,
        deliver: Callable[[Sequence[Outcome]], None],
        fatal: Callable[[str], None],
        boot_id: str,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._deliver = deliver
        self._fatal = fatal
        self._boot_id = boot_id
        self._runs = RunRows(connection, settings)
        self._rows = StoredRows(connection, settings, self._runs)
        self._sweep = Sweep(connection, settings)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._failed = False
        self._unchecked_bytes = 0  # written since the last checkpoint, about
        self.problem: str | None = None  # why storage takes no writes; None while it does

    @property
    def sweeping(self) -> bool:
        """Whether there is something left of deleted runs."""
        return self._sweep.pending

    @property
    def imports_given_up(self) -> int:
        """Runs whose import was unfinished when too many others began."""
        return self._rows.imports.given_up

    def start(self) -> None:
        """Begins to take jobs; on a full disk, to try whether it can.

        Raises:
            sqlite3.Error: storage takes no writes, and that will not pass.
        """
        try:
            self._write_boot_id()
        except sqlite3.Error as error:
            if error.sqlite_errorcode in _FSYNC_FAILED or error.sqlite_errorcode & 0xFF not in _MAY_PASS:
                raise
            log.error("storage fails: %s", error)  # noqa: TRY400 - it is no defect
            self.problem = str(error)
            self._undo()
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
            if going and self._sweep.pending and self.problem is None and not self._sweep.wait_s():
                self._sweep_on()
        if not self._failed:
            self._connection.close()

    def _gather(self) -> tuple[list[Job], bool]:
        """What waits, within the bounds of one commit; whether to go on after it."""
        jobs: list[Job] = []
        size = 0
        try:
            job = self._jobs.get(timeout=self._idle_s())
            while job is not None:
                jobs.append(job)
                size += job.command.size
                if len(jobs) >= self._settings.commit_commands or size >= self._settings.commit_bytes:
                    return jobs, True
                job = self._jobs.get_nowait()
        except Empty:
            return jobs, True
        return jobs, False

    def _idle_s(self) -> float | None:
        """How long to wait for jobs before something else is due."""
        if self.problem is not None:
            return self._settings.probe_s
        return max(self._sweep.wait_s(), _SHORT_S) if self._sweep.pending else None

    def _sweep_on(self) -> None:
        try:
            self._unchecked_bytes += self._sweep.step()
        except sqlite3.Error as error:
            if not self._is_fatal(error):
                log.warning("what deleted runs left could not be removed, it is tried again: %s", error)
                self._undo()
                self._sweep.put_off(self._settings.probe_s)
            return
        # The file gets shorter by a checkpoint only.
        if self._unchecked_bytes >= self._settings.wal_bytes or not self._sweep.pending:
            self._checkpoint()

    def _commit(self, jobs: list[Job]) -> None:
        if self._failed:
            self._deliver([Outcome(job, _fsync_failed()) for job in jobs])
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = [self._outcome(job) for job in jobs]
            self._runs.flush()
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it was, the transaction is undone and every caller told
            self._roll_back(error, jobs)
            return
        self._runs.committed()
        if self._runs.dropped:
            self._runs.dropped = False
            self._sweep.pending = True
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

    def _outcome(self, job: Job) -> Outcome:
        """One command or edit within the transaction: what it came to, or its refusal."""
        if isinstance(job.command, Edit):
            return Outcome(job, self._edit(job.command))
        return self._apply(job, job.command)

    def _apply(self, job: Job, command: Command) -> Outcome:
        before = None
        try:
            before = self._runs.head(command.run_id)
            applied = self._runs.applied(command, before)
        except Unreadable as error:
            if not is_damage(error):
                raise
            return Outcome(job, Damaged(f"storage is damaged: {in_words(error)}"))  # of its run: others are not touched
        except Exception as refusal:  # noqa: BLE001 - a refusal, or a defect: nothing is written, so its own in any case
            return Outcome(job, refusal)
        if applied.head is before:
            return Outcome(job, applied, before)
        try:
            applied = self._in_savepoint(self._runs.write, applied, before)
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:
            return Outcome(job, _refused_by_storage(error), before)
        self._runs.changed(applied.head, before)
        return Outcome(job, applied, before)

    def _edit(self, edit: Edit) -> Edited | Exception:
        if edit.changes_runs:
            self._runs.flush()
        before = self._changed_rows()
        try:
            edited = self._in_savepoint(edit.edit, self._rows)
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:
            self._runs.forget_moved()
            return _refused_by_storage(error)
        except Unreadable as error:
            if not is_damage(error):
                raise
            self._runs.forget_moved()
            return Damaged(f"storage is damaged: {in_words(error)}")  # where it looked: others are not touched
        except Exception as refusal:  # noqa: BLE001 - as above; what it wrote is undone
            self._runs.forget_moved()
            return refusal
        finally:
            self._unchecked_bytes += _ROW_BYTES * (self._changed_rows() - before)
        for change in edited.applied:
            if change.applied.head is not change.before:
                self._runs.changed(change.applied.head, change.before)
        return edited

    def _changed_rows(self) -> int:
        """How many rows were written or removed until now, but for events: these are in the sizes of their commands."""
        return self._connection.total_changes - self._runs.appended

    def _in_savepoint(self, work: Callable[..., T], *args: Any) -> T:
        """What it does is undone where it raises; its neighbours are not touched."""
        self._connection.execute("SAVEPOINT command")
        try:
            result = work(*args)
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO command")
                self._connection.execute("RELEASE command")
            raise
        self._connection.execute("RELEASE command")
        return result

    def _roll_back(self, error: Exception, jobs: list[Job]) -> None:
        """Nothing of the transaction is left; every caller is told what that means."""
        if self._is_fatal(error):
            self._deliver([Outcome(job, _fsync_failed()) for job in jobs])
            return
        why = in_words(error) if is_damage(error) else str(error)
        if not isinstance(error, sqlite3.Error):
            log.error("a defect in the writer", exc_info=error)
            why = "a defect of the daemon; its log has the details"  # nothing of the exception is for peers
        elif self.problem is None:
            log.error("storage fails: %s", why)
        self.problem = why
        self._undo()
        self._runs.undone()
        message = f"storage fails: {why}; nothing was stored"
        refusal = Damaged(message) if is_damage(error) else unavailable(message)
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
            self._write_boot_id()
        except sqlite3.Error as error:
            if not self._is_fatal(error):
                self.problem = str(error)
                self._undo()
        else:
            log.warning("storage takes writes again")
            self.problem = None

    def _write_boot_id(self) -> None:
        """Keeps whose the file is now; as small a change as any, so it also tells whether storage takes changes."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("REPLACE INTO meta VALUES ('boot_id', ?)", (self._boot_id,))
        self._connection.execute("COMMIT")


def _refused_by_storage(error: sqlite3.Error) -> RpcError:
    log.error("a command could not be stored", exc_info=error)
    return unavailable(f"storage refused it: {error}")


def _fsync_failed() -> RpcError:
    return RpcError(
        ErrorKind.UNAVAILABLE,
        "the disk did not confirm a write (fsync failed): whether this was stored is unknown; the daemon stops",
        outcome="unknown",
    )
