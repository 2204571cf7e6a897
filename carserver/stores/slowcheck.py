"""The check of a file that is too large to be checked at the start: a little later, beside the work, once.

What it finds is what lookups cannot: a run that is stored, and that no index leads to. Events are checked as they are
read, and are the most of the file: they are left out.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from carserver.core.ports import Damaged
from carserver.stores.damage import Unreadable, in_words, is_damage
from carserver.stores.schema import open_reader

log = logging.getLogger("carserver.storage")

_TABLES = ("runs", "texts", "batches", "outputs")
_STEPS = 100_000  # of SQLite's machine between two looks at whether to stop


class SlowCheck:
    """One check, in a thread of its own, with a connection that only reads.

    Args:
        path: The database file.
        after_s: When it begins: who has just started the daemon wants something else of it.
        damaged: Called in the thread with what is found.
    """

    def __init__(self, path: Path, after_s: float, damaged: Callable[[Damaged], None]) -> None:
        self._path = path
        self._after_s = after_s
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
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            if not self._stopped.wait(self._after_s):
                self._look()
        except Unreadable as error:
            if is_damage(error):
                self._damaged(Damaged(f"storage is damaged: {in_words(error)}"))
            elif not self._stopped.is_set():
                log.warning("the structure of the database could not be checked: %s", error)
        finally:
            self.done.set()

    def _look(self) -> None:
        with contextlib.closing(open_reader(self._path)) as connection:
            connection.set_progress_handler(self._stopped.is_set, _STEPS)
            for table in _TABLES:
                problem = connection.execute(f"PRAGMA integrity_check({table})").fetchone()[0]
                if problem != "ok":
                    self._damaged(Damaged(f"storage is damaged, table {table!r}: {' '.join(problem.split())}"))
                    return
        log.info("the structure of the database was checked: nothing was found")
