"""Removes the events of runs that were deleted, a piece at a time, and gives the file's free pages back.

A run is gone when its row is; its log may be a million events, and nobody shall wait for them.
"""

import sqlite3
import time

from carserver.config import Settings
from carserver.stores.rows import place

_PIECE_BYTES = 256 * 1024  # that removing a piece takes in the write-ahead log, about: freed pages are not written


class Sweep:
    """What is left to remove. Used in the writer's thread alone.

    Args:
        connection: The one that writes.
        settings: `sweep_events`, `sweep_bytes`, `sweep_pages`, `sweep_pause_s`.
    """

    def __init__(self, connection: sqlite3.Connection, settings: Settings) -> None:
        self._connection = connection
        self._events = settings.sweep_events
        self._bytes = settings.sweep_bytes
        self._pages = settings.sweep_pages
        self._pause_s = settings.sweep_pause_s
        self._page_bytes: int = connection.execute("PRAGMA page_size").fetchone()[0]
        self._next_s = 0.0
        # Imports that an earlier daemon did not finish: up to this number.
        self._unfinished: int = connection.execute("SELECT coalesce(max(no), 0) FROM imports").fetchone()[0]
        self.pending = bool(
            self._unfinished or connection.execute("SELECT EXISTS (SELECT 1 FROM dropped)").fetchone()[0]
        )

    def wait_s(self) -> float:
        """How long until the next piece, in seconds."""
        return max(self._next_s - time.monotonic(), 0.0)

    def step(self) -> int:
        """Removes one piece, in a transaction of its own; about how many bytes of the write-ahead log that took.

        Raises:
            sqlite3.Error: it is not done, and tried again by the next call.
        """
        self._next_s = time.monotonic() + self._pause_s
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        if self._unfinished:
            execute("INSERT OR IGNORE INTO dropped SELECT no FROM imports WHERE no <= ?", (self._unfinished,))
            execute("DELETE FROM imports WHERE no <= ?", (self._unfinished,))
        removed = self._remove()
        execute("COMMIT")
        self._unfinished = 0
        if removed:
            return _PIECE_BYTES
        free = self._free_pages()
        # Not `execute`: a statement without columns is given up after its first row, which here is the first page.
        self._connection.executescript(f"PRAGMA incremental_vacuum({self._pages:d})")
        left = self._free_pages()
        self.pending = 0 < left < free  # a file made before version 2 keeps its free pages; they are used again
        return (free - left) * self._page_bytes

    def put_off(self, seconds: float) -> None:
        """It could not be done: not again before that."""
        self._next_s = time.monotonic() + seconds

    def _free_pages(self) -> int:
        free: int = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
        return free

    def _remove(self) -> bool:
        """Events, then batches, then the number itself, run by run until it is a piece; False where nothing is left."""
        execute = self._connection.execute
        events, size = self._events, self._bytes
        numbers = execute("SELECT no FROM dropped ORDER BY no LIMIT ?", (events,)).fetchall()
        for (no,) in numbers:
            count, length, last = self._measure(no, events, size)
            execute("DELETE FROM events WHERE place >= ? AND place <= ?", (place(no, 0), last))
            events, size = events - count - 1, size - length  # a number is work, too
            if events <= 0 or size <= 0:
                break
            events -= execute(
                "DELETE FROM batches WHERE no = ? AND batch_id IN (SELECT batch_id FROM batches WHERE no = ? LIMIT ?)",
                (no, no, events),
            ).rowcount
            if events <= 0:
                break
            execute("DELETE FROM dropped WHERE no = ?", (no,))
        return bool(numbers)

    def _measure(self, no: int, events: int, size: int) -> tuple[int, int, int]:
        """How many events of this number are a piece, their bytes, and the place of the last of them."""
        rows = self._connection.execute(
            "SELECT place, length(event) FROM events WHERE place >= ? AND place < ? ORDER BY place LIMIT ?",
            (place(no, 0), place(no + 1, 0), events),
        )
        count, taken, last = 0, 0, -1
        for found, length in rows:
            count, taken, last = count + 1, taken + length, found
            if taken >= size:
                break
        rows.close()
        return count, taken, last
