"""Copies of the database, whole and consistent, while it is written to.

The copy is one snapshot: what was acknowledged before it began is in it. It is taken page by page from a connection
that only reads (`VACUUM INTO` takes twice as long, and its sync holds up the writer's). Until it ends, no checkpoint
goes past the snapshot and the write-ahead log grows, so there is a bound to that.
"""

import asyncio
import contextlib
import errno
import fcntl
import glob
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex

from carserver.config import Settings
from carserver.core.ports import Damaged
from carserver.protocol.errors import invalid_params, overloaded, unavailable
from carserver.protocol.server import BackedUp
from carserver.stores.damage import Unreadable, in_words, is_damage, mark_of
from carserver.stores.deadlines import resolve
from carserver.stores.inspection import beside, size_of
from carserver.stores.recovery import sync
from carserver.stores.rows import mark_copied
from carserver.stores.schema import StorageError, check_version, open_reader

log = logging.getLogger("carserver.storage")

_STEP_PAGES = 256  # between two looks at whether somebody still wants it
_SYNC_STEPS = 64  # so that no sync is long, for the writer waits behind it; nor are there many
_CHECK_STEPS = 1_000_000  # of SQLite's machine, between two such looks while the copy is checked
_AGAIN_S = 0.05  # between two tries to end that check: one that falls between two statements ends none
_BESIDE = ("-wal", "-shm", "-journal")
_NOT_THE_PATHS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class _GivenUp(Exception):
    """Nobody wants it any more, or it takes too long; the message says which."""


class Backups:
    """Makes backups, one at a time, each in a thread of its own. Used on the loop.

    Args:
        path: The database file.
        settings: `backup_log_bytes`, `retry_after_ms`.
        damaged: Called in the thread where the database is found damaged.
    """

    def __init__(self, path: Path, settings: Settings, damaged: Callable[[Damaged], None]) -> None:
        self._path = path
        self._settings = settings
        self._damaged = damaged
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._why_not = ""  # why the one that is under way shall end
        self._checking: sqlite3.Connection | None = None  # a copy that is being looked at

    @property
    def under_way(self) -> bool:
        """Whether one is being made."""
        return self._thread is not None and self._thread.is_alive()

    async def make(self, path: str) -> BackedUp:
        """A backup at `path`, an absolute path of a file that is not there yet; its folder is.

        Where the caller is cancelled, it is given up, and nothing is left of it.

        Raises:
            RpcError: invalid_params, overloaded, unavailable.
        """
        if self.under_way:
            raise overloaded("a backup is being made: one at a time", self._settings.retry_after_ms)
        future: asyncio.Future[BackedUp] = self._loop.create_future()
        self._why_not = ""

        def work() -> None:
            try:
                made: BackedUp | Exception = self._make(Path(path))
            except Exception as error:  # noqa: BLE001 - whatever it was, whoever waits is told
                made = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(resolve, future, made)

        self._thread = threading.Thread(target=work, name="backup", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            raise unavailable(f"no backup can be made now: {error}") from None
        try:
            return await future
        except asyncio.CancelledError:
            self.give_up("nobody waits for it any more")
            raise

    def give_up(self, why: str) -> None:
        """The one that is under way ends soon, with nothing left of it."""
        self._why_not = why
        if self._checking is not None:  # SQLite looks at trees without asking its progress handler
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
                self._checking.interrupt()

    def close(self) -> None:
        """Waits for the end of what is under way; blocks."""
        while self._thread is not None and self._thread.is_alive():
            self.give_up("the daemon ends")
            self._thread.join(_AGAIN_S)

    # In the thread.

    def _make(self, target: Path) -> BackedUp:
        self._check(target)
        with _explained(target):
            _remove_left(target)
            temporary = target.with_name(f".{target.name}.{token_hex(8)}.partial")
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # so that another backup knows that it is no leftover
                self._copy(temporary, fd)
                runs = self._look_at(temporary)
                os.fsync(fd)
                target.hardlink_to(temporary)  # unlike a rename, it never takes the place of another file
                size = os.fstat(fd).st_size
            finally:
                temporary.unlink(missing_ok=True)
                os.close(fd)
            sync(target.parent)
        log.info("a backup was made: %s, %d bytes", target, size)
        return BackedUp(path=str(target), bytes=size, runs=runs)

    def _check(self, target: Path) -> None:
        if not target.parent.is_dir():
            raise invalid_params("path", f"{target.parent} is no folder that the daemon can see")
        for file in (target, *(beside(target, suffix) for suffix in _BESIDE)):
            if os.path.lexists(file):
                raise invalid_params("path", f"{file} is there already: a backup replaces nothing")
        own = target.name.startswith(self._path.name) or target.name == mark_of(self._path).name
        if own and target.parent.samefile(self._path.parent):
            raise invalid_params("path", f"{target.name} is a name of the daemon's own in its folder: choose another")

    def _copy(self, temporary: Path, fd: int) -> None:
        steps = 0

        def progress(*_: int) -> None:
            nonlocal steps
            self._go_on()
            steps += 1
            if steps % _SYNC_STEPS == 0:
                os.fdatasync(fd)

        with (
            contextlib.closing(open_reader(self._path)) as source,
            contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as copy,
        ):
            copy.execute("PRAGMA journal_mode = OFF")  # what is cut off is thrown away
            copy.execute("PRAGMA synchronous = OFF")
            source.execute("BEGIN")
            source.execute("SELECT 1 FROM sqlite_schema").fetchone()  # the snapshot: commits do not make it begin anew
            source.backup(copy, pages=_STEP_PAGES, progress=progress)
            mark_copied(copy)

    def _look_at(self, temporary: Path) -> int:
        """Whether the copy is a database, and how many runs are in it."""
        uri = f"{temporary.as_uri()}?mode=ro&immutable=1"  # it is whole without a log
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)) as copy:
            self._checking = copy
            copy.set_progress_handler(lambda: bool(self._why_not), _CHECK_STEPS)
            try:
                check_version(copy, temporary)
                for (problem,) in copy.execute("PRAGMA quick_check(1)"):
                    if problem != "ok":
                        raise self._found(problem)
                runs: int = copy.execute("SELECT count(*) FROM runs").fetchone()[0]
            except Unreadable as error:
                self._go_on()
                if is_damage(error):
                    raise self._found(in_words(error)) from error
                raise
        return runs

    def _go_on(self) -> None:
        if self._why_not:
            raise _GivenUp(self._why_not)
        if size_of(beside(self._path, "-wal")) > self._settings.backup_log_bytes:
            raise _GivenUp(
                "the write-ahead log may not grow over backup_log_bytes meanwhile: write to a faster disk, or when less"
                " is recorded"
            )

    def _found(self, problem: str) -> Damaged:
        damaged = Damaged(f"the database is damaged, and no backup was made: {' '.join(problem.split())}")
        self._damaged(damaged)
        return damaged


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except _GivenUp as error:
        raise unavailable(f"the backup was given up: {error}") from None
    except FileExistsError:
        raise invalid_params("path", f"{target} is there already: a backup replaces nothing") from None
    except OSError as error:
        if error.errno in _NOT_THE_PATHS:
            raise unavailable(f"the backup cannot be written: {error.strerror}") from error
        raise invalid_params("path", f"the daemon cannot make a file there: {error.strerror}") from error
    except (*Unreadable, StorageError) as error:
        raise unavailable(f"the backup cannot be made: {error}") from error


def _remove_left(target: Path) -> None:
    """What a daemon left that was killed while it made this backup."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError):  # it is somebody else's, or gone
            fd = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(fd)
