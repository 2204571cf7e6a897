"""The log of runs in one SQLite file: the loop's side of the writer thread and of the reader threads.

Every request is answered within `storage_s`, or told that its outcome is unknown; how many wait is bounded.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Command
from carserver.core.counters import Counters
from carserver.core.edits import Edit
from carserver.core.ports import Committed, Done, PageDone, Place, Scan
from carserver.core.runs import Head, LiveRun
from carserver.protocol.errors import ErrorKind, RpcError, overloaded
from carserver.protocol.runs import ListRuns
from carserver.protocol.server import StorageStatus
from carserver.stores import rows
from carserver.stores.deadlines import Deadlines
from carserver.stores.readers import Readers
from carserver.stores.schema import StorageError, open_writer
from carserver.stores.writer import Job, Outcome, Writer

T = TypeVar("T")

SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL", "memory": "OFF"}


class SqliteStore:
    """Implements `core.ports.RunLog`.

    Args:
        path: The database file.
        boot_id: This daemon's, kept for the next one; `old_boot_id` is the one before, if there was one.
        settings: Bounds, durability.
        counters: What is counted.
        fatal: Called on the loop when the daemon must stop: an fsync failed.

    Raises:
        StorageError: see `schema.open_writer`.
    """

    def __init__(
        self, path: Path, boot_id: str, settings: Settings, counters: Counters, fatal: Callable[[str], None]
    ) -> None:
        self._path = path
        self._settings = settings
        self._counters = counters
        self._fatal = fatal
        self._loop = asyncio.get_running_loop()
        self._publish: Callable[[Sequence[Committed | Done]], None] = lambda _: None
        self._deadlines = Deadlines(settings.storage_s, self._give_up)
        self._waiting_bytes = 0
        self._waiting = 0
        connection = open_writer(path, synchronous=SYNCHRONOUS[settings.durability])
        try:
            self.found_live: list[LiveRun] = rows.read_live(connection)
            self.old_boot_id = rows.swap_meta(connection, "boot_id", boot_id)
            self._writer = Writer(connection, settings, self._from_writer, self._fatal_from_writer)
            self._readers = Readers(path, settings.read_threads, "reader")
            # Pages for those who watch do not wait behind what others ask for.
            self._page_readers = Readers(path, settings.catch_up_reads, "page-reader")
        except sqlite3.Error as error:
            raise StorageError(f"cannot read {path}: {error}; move it away, or restore a backup of it") from error
        self._writer.start()

    def on_commit(self, publish: Callable[[Sequence[Committed | Done]], None]) -> None:
        """Whom to hand each commit to, before it is acknowledged."""
        self._publish = publish

    # Writing.

    async def submit(self, command: Command, by: Attendant | None) -> Any:
        """See `core.ports.RunLog`.

        Raises:
            RpcError: the command's refusal; overloaded, unavailable, deadline_exceeded.
        """
        return await self._put(command, by)

    async def edit(self, edit: Edit) -> Any:
        """See `core.ports.RunLog`."""
        return await self._put(edit, None)

    async def _put(self, command: Command | Edit, by: Attendant | None) -> Any:
        if self._waiting >= self._settings.write_queue or self._waiting_bytes >= self._settings.write_queue_bytes:
            raise overloaded("too many changes wait for storage", self._settings.retry_after_ms)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting += 1
        self._waiting_bytes += command.size
        self._writer.put(Job(future, command, by))
        self._deadlines.expect(future, self._waiting + self._readers.waiting)
        return await future

    def _from_writer(self, outcomes: Sequence[Outcome]) -> None:
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
            self._publish(committed)
        finally:
            for job, result, _ in outcomes:
                self._waiting -= 1
                self._waiting_bytes -= job.command.size
                _resolve(job.future, result if isinstance(result, Exception) else result.answer)

    # Reading.

    async def head(self, run_id: str) -> Head | None:
        """See `core.ports.RunLog`."""
        return await self._read(rows.read_head, run_id)

    async def list(self, owner: str | None, filters: ListRuns, after: Place | None, limit: int) -> list[Head]:
        """See `core.ports.RunLog`."""
        return await self._read(rows.read_list, owner, filters, after, limit, self._settings.page_bytes)

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

    def page(self, head: Head, start: int, stop: int, entries: int, size: int, done: PageDone) -> None:
        """See `core.ports.PageReader`."""
        self._page_readers.read(rows.read_page, (head, start, stop, entries, size), done)

    async def _read(self, read: Callable[..., T], *args: Any) -> T:
        if self._readers.waiting >= self._settings.read_queue:
            raise overloaded("too many reads wait for storage", self._settings.retry_after_ms)
        future: asyncio.Future[T] = self._loop.create_future()
        self._readers.read(read, args, lambda result: _resolve(future, result))
        self._deadlines.expect(future, self._waiting + self._readers.waiting)
        return await future

    def _give_up(self, future: "asyncio.Future[Any]") -> None:
        self._counters.storage_deadlines += 1
        _resolve(future, _too_slow(self._settings.storage_s))

    # The whole.

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


def _resolve(future: "asyncio.Future[Any]", result: object) -> None:
    """Answers a caller who is still there."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
        future.exception()  # its caller may have gone: then nobody retrieves it, which is no defect
    else:
        future.set_result(result)


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
