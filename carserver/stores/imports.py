"""Runs that are being imported: their events are stored already, under numbers that no run has yet.

What is unfinished when the daemon ends goes to the sweep of the next one: whoever imports it begins the run again.
"""

import sqlite3

from carserver.config import Settings
from carserver.core.edits import Staged
from carserver.stores.runrows import RunRows

_COLUMNS = "no, run_id, run, cursor, last_at_ms, status, log_bytes, turns"


class ImportRows:
    """Implements `core.edits.StoredImports`; used in the writer's thread alone.

    Args:
        connection: The one that writes.
        settings: `imports`.
        runs: Whose numbers these are.
    """

    def __init__(self, connection: sqlite3.Connection, settings: Settings, runs: RunRows) -> None:
        self._connection = connection
        self._most = settings.imports
        self._runs = runs
        self.given_up = 0  # that were unfinished when too many others began
        # Of an earlier daemon: the sweep has not come to them yet.
        self._stale: int = connection.execute("SELECT coalesce(max(no), 0) FROM imports").fetchone()[0]

    def get(self, run_id: str) -> Staged | None:
        """See `core.edits.StoredImports`."""
        row = self._connection.execute(
            f"SELECT {_COLUMNS} FROM imports WHERE run_id = ? AND no > ?",  # noqa: S608 - constants
            (run_id, self._stale),
        ).fetchone()
        return None if row is None else Staged(*row)

    def begin(self, run_id: str, run: bytes, last_at_ms: int) -> Staged:
        """See `core.edits.StoredImports`."""
        execute = self._connection.execute
        for (no,) in execute("SELECT no FROM imports WHERE run_id = ?", (run_id,)).fetchall():
            self._drop(no)
        for (no,) in execute("SELECT no FROM imports ORDER BY no DESC LIMIT -1 OFFSET ?", (self._most - 1,)).fetchall():
            self._drop(no)
            self.given_up += 1
        staged = Staged(self._runs.new_no(), run_id, run, cursor=0, last_at_ms=last_at_ms, status=None)
        self._runs.use_up()
        execute(f"INSERT INTO imports ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", staged)  # noqa: S608 - constants
        return staged

    def grown(self, staged: Staged) -> None:
        """See `core.edits.StoredImports`."""
        self._connection.execute(
            "UPDATE imports SET cursor = ?, last_at_ms = ?, status = ?, log_bytes = ?, turns = ? WHERE no = ?",
            (staged.cursor, staged.last_at_ms, staged.status, staged.log_bytes, staged.turns, staged.no),
        )

    def finished(self, staged: Staged) -> None:
        """See `core.edits.StoredImports`."""
        self._connection.execute("DELETE FROM imports WHERE no = ?", (staged.no,))

    def _drop(self, no: int) -> None:
        self._connection.execute("DELETE FROM imports WHERE no = ?", (no,))
        self._runs.drop_log(no)
