"""Removes the events of runs that were deleted, a piece at a time, and gives the file's free pages back.

A run is gone when its row is; its log may be a million events, and nobody shall wait for them.
"""

import sqlite3
import time

from carserver.config import Settings
from carserver.stores.rows import place


class Sweep:
    """What is left to remove. Used in the writer's thread alone.

    Args:
        connection: The one that writes.
        settings: `sweep_events`, `sweep_pages`, `sweep_pause_s`.
    """

    def __init__(self, connection: sqlite3.Connection, settings: Settings) -> None:
        self._connection = connection
        self._events = settings.sweep_events
        self._pages = settings.sweep_pages
        self._pause_s = settings.sweep_pause_s
        self._next_s = 0.0
        self.pending = bool(connection.execute("SELECT EXISTS (SELECT 1 FROM dropped)").fetchone()[0])

    def wait_s(self) -> float:
        """How long until the next piece, in seconds."""
        return max(self._next_s - time.monotonic(), 0.0)

    def step(self) -> None:
        """Removes one piece, in a transaction of its own.

        Raises:
            sqlite3.Error: it is not done, and tried again by the next call.
        """
        self._next_s = time.monotonic() + self._pause_s
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        row = execute("SELECT no FROM dropped ORDER BY no LIMIT 1").fetchone()
        if row is not None:
            self._remove(row[0])
            more = True
        else:
            free = execute("PRAGMA freelist_count").fetchone()[0]
            execute(f"PRAGMA incremental_vacuum({self._pages:d})").fetchall()
            # A file made before version 2 keeps its free pages; they are used again.
            more = 0 < execute("PRAGMA freelist_count").fetchone()[0] < free
        execute("COMMIT")
        self.pending = more

    def _remove(self, no: int) -> None:
        execute = self._connection.execute
        ends = place(no, 0), place(no + 1, 0)
        removed = execute(
            "DELETE FROM events WHERE place IN (SELECT place FROM events WHERE place >= ? AND place < ? LIMIT ?)",
            (*ends, self._events),
        ).rowcount
        removed += execute(
            "DELETE FROM batches WHERE no = ? AND batch_id IN (SELECT batch_id FROM batches WHERE no = ? LIMIT ?)",
            (no, no, self._events),
        ).rowcount
        if not removed:
            execute("DELETE FROM dropped WHERE no = ?", (no,))
