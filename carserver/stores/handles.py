"""Handles as rows: those whose `tool_end` is not in their run's log yet, and the keys that any were made with.

Nothing may run twice for a key, so a key that is not found must not be one that a flipped bit hides (`lookups`).
"""

import sqlite3

from carserver.core.edits import OpenHandle, UsedKey
from carserver.core.ports import Damaged
from carserver.stores.lookups import find_row
from carserver.stores.schema import row_checksum

_FORGET = 200
"""Keys that are looked at in one transaction. Each invocation adds one, so old ones go faster than new ones come."""
_OLD = "SELECT * FROM tool_keys WHERE at_ms < ? ORDER BY at_ms LIMIT ?"


class HandleRows:
    """Implements `core.edits.StoredHandles`; used in the writer's thread alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def open(self, row: OpenHandle) -> None:
        """See `core.edits.StoredHandles`."""
        self._connection.execute("INSERT INTO handles VALUES (?, ?, ?, ?)", (*row, row_checksum(*row)))

    def close(self, handle: str) -> bool:
        """See `core.edits.StoredHandles`."""
        if find_row(self._connection, "handles", (handle,)) is None:
            return False
        self._connection.execute("DELETE FROM handles WHERE handle = ?", (handle,))
        return True

    def used_key(self, owner: str, method: str, key: str) -> UsedKey | None:
        """See `core.edits.StoredHandles`."""
        row = find_row(self._connection, "tool_keys", (owner, method, key))
        return None if row is None else UsedKey(*row[:-1])

    def use_key(self, used: UsedKey) -> None:
        """See `core.edits.StoredHandles`."""
        self._connection.execute("INSERT INTO tool_keys VALUES (?, ?, ?, ?, ?, ?, ?)", (*used, row_checksum(*used)))

    def forget_keys(self, before_ms: int) -> None:
        """See `core.edits.StoredHandles`."""
        rows = self._connection.execute(_OLD, (before_ms, _FORGET)).fetchall()
        # A damaged one says nothing of its age: it stays, for whoever looks it up to be told.
        old = [row[:3] for row in rows if row_checksum(*row[:-1]) == row[-1]]
        self._connection.executemany("DELETE FROM tool_keys WHERE owner = ? AND method = ? AND key = ?", old)


def read_open(connection: sqlite3.Connection) -> list[OpenHandle]:
    """The handles that are open.

    Raises:
        Damaged: the row of one is not what was stored.
    """
    found = []
    for *values, stored in connection.execute("SELECT handle, run_id, tool, checksum FROM handles"):
        if row_checksum(*values) != stored:
            raise Damaged(f"the row of the open handle {values[0]!r} is damaged")
        found.append(OpenHandle(*values))
    return found
