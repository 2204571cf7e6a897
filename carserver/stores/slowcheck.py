"""The check of a file that is too large to be checked at the start: a little later, beside the work, once.

What it finds is what lookups cannot: a run that is stored, and that no index leads to. Events are checked as they are
read, and are the most of the file: they are left out.
"""

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from carserver.config import Settings
from carserver.core.ports import Damaged
from carserver.stores.damage import Unreadable, in_words, is_damage
from carserver.stores.inspection import beside, size_of
from carserver.stores.schema import open_reader

log = logging.getLogger("carserver.storage")

_TABLES = ("runs", "texts", "batches", "outputs", "handles", "tool_keys", "receipts", "approvals")
_STEPS = 100_000  # of SQLite's machine between two looks at whether to stop
_AGAIN_S = 0.05  # between two tries to end a statement: one that falls between two statements ends none


class SlowCheck:
    """One check, in a thread of its own, with a connection that only reads.

    Args:
        path: The database file.
        settings: `check_after_s`: who has just started the daemon wants something else of it at first;
            `backup_log_bytes`: while it reads, the write-ahead log grows, as beside a backup.
        damaged: Called in the thread with what is found.
    """

    def __init__(self, path: Path, settings: Settings, damaged: Callable[[Damaged], None]) -> None:
        self._path = path
        self._after_s = settings.check_after_s
        self._log_bytes = settings.backup_log_bytes
        self._connection: sqlite3.Connection | None = None
        self._damaged = damaged
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self.done = threading.Event()

    def start(self) -> None:
        """Begins to wait for its time."""
        try:
            self._thread.start()
        except RuntimeError as error:
            log.warning("the structure of the database is not checked: %s", error)

    def stop(self) -> None:
        """Ends it, wherever it is; blocks for a moment."""
        self._stopped.set()
        while self._thread.is_alive():
            if self._connection is not None:  # SQLite looks at trees without asking its progress handler
                with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
                    self._connection.interrupt()
            self._thread.join(_AGAIN_S)

    def _run(self) -> None:
        try:
            if not self._stopped.wait(self._after_s):
                self._look()
        except Unreadable as error:
            if is_damage(error):
                self._damaged(Damaged(f"storage is damaged: {in_words(error)}"))
            elif not self._stopped.is_set():
                why = "the write-ahead log grew over backup_log_bytes meanwhile" if self._must_end() else str(error)
                log.warning("the structure of the database was not checked: %s; the next start tries again", why)
        finally:
            self.done.set()

    def _look(self) -> None:
        with contextlib.closing(open_reader(self._path)) as connection:
            self._connection = connection
            connection.set_progress_handler(self._must_end, _STEPS)
            for table in _TABLES:
                problem = connection.execute(f"PRAGMA integrity_check({table})").fetchone()[0]
                if problem != "ok":
                    self._damaged(Damaged(f"storage is damaged, table {table!r}: {' '.join(problem.split())}"))
                    return
        log.info("the structure of the database was checked: nothing was found")

    def _must_end(self) -> bool:
        return self._stopped.is_set() or size_of(beside(self._path, "-wal")) > self._log_bytes
