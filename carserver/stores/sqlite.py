"""The log of runs in one SQLite file: the loop's side of the writer thread and of the reader threads.

Every request is answered within `storage_s`, or told that its outcome is unknown; how many wait is bounded.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Command
from carserver.core.counters import Counters
from carserver.core.edits import Edit, OpenHandle, StoredApproval
from carserver.core.outputs import Listed, Output
from carserver.core.ports import Committed, Criteria, Damaged, Done, PageDone, Place, Plan, Scan
from carserver.core.principals import Principal
from carserver.core.runs import Head, LiveRun
from carserver.protocol.errors import ErrorKind, RpcError, overloaded
from carserver.protocol.outputs import LatestOutput, ListOutputs
from carserver.protocol.runs import ListRuns
from carserver.protocol.server import BackedUp, StorageStatus
from carserver.stores import outputs, rows
from carserver.stores.backup import Backups
from carserver.stores.damage import Damage, Unreadable, in_words, is_damage
from carserver.stores.deadlines import Deadlines, resolve
from carserver.stores.plan import read_plan
from carserver.stores.readers import Readers
from carserver.stores.recovery import open_database
from carserver.stores.schema import StorageError, cannot_open
from carserver.stores.slowcheck import SlowCheck
from carserver.stores.writer import Job, Outcome, Writer

T = TypeVar("T")


class SqliteStore:
    """Implements `core.ports.RunLog` and `core.outputstore.OutputLog`.

    Args:
        path: The database file.
        boot_id: This daemon's, kept for the next one; `old_boot_id` is the one before, if there was one.
        settings: Bounds, durability.
        counters: What is counted.
        fatal: Called on the loop when the daemon must stop: an fsync failed.

    Raises:
        StorageError: see `recovery.open_database`.
    """

    def __init__(
        self, path: Path, boot_id: str, settings: Settings, counters: Counters, fatal: Callable[[str], None]
    ) -> None:
        self._path = path
        self._settings = settings
        self._counters = counters
        self._fatal = fatal
        self._loop = asyncio.get_running_loop()
        self._publish: list[Callable[[Sequence[Committed | Done]], None]] = []
        self._deadlines = Deadlines(settings.storage_s, self._give_up)
        self._waiting_bytes = 0
        self._waiting = 0
        connection, live, open_handles, approvals = open_database(path, settings)
        self.found_live: list[LiveRun] = live
        self.found_open: list[OpenHandle] = open_handles
        self.found_approvals: list[StoredApproval] = approvals
        self.damage = Damage(path)
        try:
            self.old_boot_id = rows.read_boot_id(connection)
            self._writer = Writer(connection, settings, self._from_writer, self._fatal_from_writer, boot_id)
            self._readers = Readers(path, settings.read_threads, "reader", self.damage.found)
            # Pages for those who watch do not wait behind what others ask for.
            self._page_readers = Readers(path, settings.catch_up_reads, "page-reader", self.damage.found)
            self._writer.start()
        except Unreadable as error:
            if is_damage(error):
                self.damage.found(Damaged(f"storage is damaged: {in_words(error)}"))
                raise StorageError(f"cannot open {path}: {error}; start again: all of it is checked then") from error
            raise cannot_open(path, error) from error
        self._backups = Backups(path, settings, self.damage.found)
        self.slow_check: SlowCheck | None = None
        if _size(path) > settings.check_bytes:
            self.slow_check = SlowCheck(path, settings, self.damage.found)
            self.slow_check.start()

    def on_commit(self, publish: Callable[[Sequence[Committed | Done]], None]) -> None:
        """Whom to hand each commit to, before it is acknowledged; one after another, in the order of these calls."""
        self._publish.append(publish)

    # Writing.

    async def submit(self, command: Command, by: Attendant | None, *, patient: bool = False) -> Any:
        """See `core.ports.RunLog`.

        Raises:
            RpcError: the command's refusal; overloaded, unavailable, deadline_exceeded.
        """
        return await self._put(command, by, patient=patient)

    async def edit(self, edit: Edit, by: Attendant | None = None, *, patient: bool = False) -> Any:
        """See `core.ports.RunLog`."""
        return await self._put(edit, by, patient=patient)

    async def _put(self, command: Command | Edit, by: Attendant | None, *, patient: bool) -> Any:
        if self._waiting >= self._settings.write_queue or self._waiting_bytes >= self._settings.write_queue_bytes:
            raise overloaded("too many changes wait for storage", self._settings.retry_after_ms)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting += 1
        self._waiting_bytes += command.size
        self._writer.put(Job(future, command, by))
        if not patient:
            self._deadlines.expect(future, self._waiting + self._readers.waiting)
        return await future

    def _from_writer(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome.result, Damaged):
                self.damage.found(outcome.result)
        self._loop.call_soon_threadsafe(self._deliver, outcomes)

    def _fatal_from_writer(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self._fatal, why)

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        """One commit: publishes it, then acknowledges it."""
        committed = [outcome.committed() for outcome in outcomes if not isinstance(outcome.result, Exception)]
        self._counters.commands += len(outcomes)
        self._counters.commits += bool(committed)
        self._counters.storage_failures += not committed and self._writer.problem is not None
        try:
            with contextlib.ExitStack() as all_of_them:  # each, also where one before it has a defect
                for publish in reversed(self._publish):
                    all_of_them.callback(publish, committed)
        finally:
            for job, result, _ in outcomes:
                self._waiting -= 1
                self._waiting_bytes -= job.command.size
                resolve(job.future, result if isinstance(result, Exception) else result.answer)

    # Reading.

    async def head(self, run_id: str) -> Head | None:
        """See `core.ports.RunLog`."""
        return await self._read(rows.read_head, run_id)

    async def list(self, owner: str | None, filters: ListRuns, after: Place | None, limit: int) -> list[Head]:
        """See `core.ports.RunLog`."""
        return await self._read(rows.read_list, owner, filters, after, limit, self._settings.page_bytes)

    async def plan(self, criteria: Criteria, ids: int) -> Plan:
        """See `core.ports.PruneLog`."""
        return await self._read(read_plan, criteria, ids)

    async def scan(self, head: Head, start: int, stop: int, limit: int, types: Sequence[str] | None) -> Scan:
        """See `core.ports.RunLog`."""
        settings = self._settings

        def read(connection: sqlite3.Connection) -> Scan:
            return rows.read_scan(
                connection,
                head,
                start,
                stop,
                limit=limit,
                types=types,
                page_bytes=settings.page_bytes,
                scan_entries=settings.scan_entries,
                scan_bytes=settings.scan_bytes,
            )

        return await self._read(read)

    async def output(self, output_id: str, to: Principal) -> Output | None:
        """See `core.outputstore.OutputLog`."""
        return await self._read(outputs.read_output, output_id, to)

    async def keyed_output(self, owner: str, key: str) -> Output | None:
        """See `core.outputstore.OutputLog`."""
        return await self._read(outputs.read_keyed, owner, key)

    async def latest_output(self, filters: LatestOutput, to: Principal) -> Output | None:
        """See `core.outputstore.OutputLog`."""
        return await self._read(outputs.read_latest, filters, to)

    async def outputs(self, filters: ListOutputs, to: Principal, after: int, limit: int) -> Listed:
        """See `core.outputstore.OutputLog`."""
        inline_bytes, page_bytes = self._settings.output_inline_bytes, self._settings.page_bytes
        return await self._read(outputs.read_outputs, filters, to, after, limit, inline_bytes, page_bytes)

    def page(self, head: Head, start: int, stop: int, entries: int, size: int, done: PageDone) -> None:
        """See `core.ports.PageReader`."""
        self._page_readers.read(rows.read_page, (head, start, stop, entries, size), done)

    async def _read(self, read: Callable[..., T], *args: Any) -> T:
        if self._readers.waiting >= self._settings.read_queue:
            raise overloaded("too many reads wait for storage", self._settings.retry_after_ms)
        future: asyncio.Future[T] = self._loop.create_future()
        self._readers.read(read, args, lambda result: resolve(future, result))
        self._deadlines.expect(future, self._waiting + self._readers.waiting)
        return await future

    def _give_up(self, future: "asyncio.Future[Any]") -> None:
        self._counters.storage_deadlines += 1
        resolve(future, _too_slow(self._settings.storage_s))

    # The whole.

    async def backup(self, path: str) -> BackedUp:
        """A copy of the file, see `backup.Backups`; it may take longer than other answers of storage."""
        made = await self._backups.make(path)
        self._counters.backups += 1
        return made

    def give_up_backup(self, why: str) -> None:
        """The backup that is being made, if one is, ends without one."""
        self._backups.give_up(why)

    @property
    def problem(self) -> str | None:
        """Why storage takes no writes; None while it does."""
        return self._writer.problem

    @property
    def waiting_bytes(self) -> int:
        """Of changes that wait for the writer, about."""
        return self._waiting_bytes

    @property
    def waiting_reads(self) -> int:
        """Reads that were started and are not answered."""
        return self._readers.waiting + self._page_readers.waiting

    @property
    def sweeping(self) -> bool:
        """Whether there is something left of deleted runs."""
        return self._writer.sweeping

    @property
    def imports_given_up(self) -> int:
        """Runs whose import was unfinished when too many others began."""
        return self._writer.imports_given_up

    def status(self) -> StorageStatus:
        """Sizes, and what waits. Looks at the files' sizes, never opens them: closing would drop SQLite's locks."""
        return StorageStatus(
            durability=self._settings.durability,
            database_bytes=_size(self._path),
            log_bytes=_size(Path(f"{self._path}-wal")),
            waiting_commands=self._waiting,
            problem=self.problem,
        )

    async def close(self, within_s: float) -> bool:
        """Finishes what waits, then closes every connection: the writer's last, for that one checkpoints.

        False where storage has not come to an end in time: then nothing but the end of the process ends it.
        """
        self._deadlines.close()
        closed = asyncio.Event()

        def close() -> None:
            self._backups.close()
            if self.slow_check is not None:
                self.slow_check.stop()
            self._readers.close()
            self._page_readers.close()
            self._writer.stop()
            self._loop.call_soon_threadsafe(closed.set)

        # Not the loop's own threads: the loop would wait for them without end.
        threading.Thread(target=close, name="closer", daemon=True).start()
        try:
            await asyncio.wait_for(closed.wait(), within_s)
        except TimeoutError:
            return False
        return True


def _too_slow(seconds: float) -> RpcError:
    return RpcError(
        ErrorKind.DEADLINE_EXCEEDED,
        f"storage did not answer within {seconds:g} s; whether it was done is unknown: send the same batch_id or key"
        " again",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
