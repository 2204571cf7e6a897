"""Damage that reads and writes meet while the daemon runs: said once per place, and marked for the next start.

The mark is a file beside the database: it outlives a kill, and a database that takes no writes cannot refuse it. The
next start checks the whole file then, and sets it aside if that finds anything (`stores.recovery`).
"""

import logging
import os
import sqlite3
import threading
from pathlib import Path

from carserver.core.ports import Damaged, Deleted

log = logging.getLogger("carserver.storage")

_PLACES = 1_000  # that are told from each other; beyond, they are counted alone
_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRIMARY = 0xFF  # of an extended result code


Unreadable = (sqlite3.Error, UnicodeDecodeError)
"""What the module raises where it cannot read: the latter where a name in the very message is damaged."""


def is_damage(error: Exception) -> bool:
    """Whether the file holds what it must not, as opposed to a disk that fails or is full."""
    return _is_text(error) or getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _CODES


def in_words(error: Exception) -> str:
    """What is wrong; never with what is stored, which is for its owner alone."""
    return "a text is no UTF-8 any more" if _is_text(error) else str(error)


def _is_text(error: Exception) -> bool:
    own = isinstance(error, sqlite3.OperationalError) and not hasattr(error, "sqlite_errorcode")
    if isinstance(error, UnicodeDecodeError) or (own and str(error).startswith("Could not decode")):
        return True
    return str(error) == "user-defined function raised exception"  # `row_checksum`, which takes anything else


def mark_of(path: Path) -> Path:
    """Where damage of this database is marked."""
    return path.with_name("damaged")


class Damage:
    """What was found in one database. Every method may be called in any thread.

    Args:
        path: The database file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = mark_of(path)
        self._lock = threading.Lock()
        self._places: set[str] = set()
        self._marked = False
        self.count = 0  # times that it was met

    def found(self, error: Damaged) -> None:
        """A read or a write met it, and its caller is told."""
        if isinstance(error, Deleted):
            return
        with self._lock:
            self.count += 1
            if error.message in self._places or len(self._places) >= _PLACES:
                return
            self._places.add(error.message)
            if not self._marked:
                self._marked = self._write_mark(error.message)
        log.error(
            "%s; restart the daemon: it then checks all of %s, sets it aside if it is damaged, and carries over what is"
            " whole; or restore a backup",
            error.message,
            self._path,
        )

    def _write_mark(self, message: str) -> bool:
        try:
            fd = os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(f"{message}\n".encode())
                file.flush()
                os.fsync(fd)
        except OSError as error:
            log.warning("%s could not be written (%s): the next start checks less", self._mark, error.strerror)
            return False
        return True
