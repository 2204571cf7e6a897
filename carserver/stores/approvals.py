"""Approvals as rows: those that are pending, and the newest that were resolved.

A person's word is asked for once and given once, so an approval that is not found must not be one that a flipped bit
hides (`lookups`).
"""

import sqlite3

from carserver.core.edits import StoredApproval
from carserver.core.ports import Damaged
from carserver.stores.lookups import find_row
from carserver.stores.schema import row_checksum

_PENDING = "SELECT count(*), coalesce(sum(length(approval)), 0) FROM approvals WHERE resolved_at_ms IS NULL"
_LENGTH = "SELECT length(approval) FROM approvals WHERE id = ?"
_RESOLVED = (
    "SELECT id, length(approval) FROM approvals WHERE resolved_at_ms IS NOT NULL AND id != ?"
    " ORDER BY resolved_at_ms DESC, created_at_ms DESC"
)


class ApprovalRows:
    """Implements `core.edits.StoredApprovals`; used in the writer's thread alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, approval_id: str) -> StoredApproval | None:
        """See `core.edits.StoredApprovals`."""
        row = find_row(self._connection, "approvals", (approval_id,))
        return None if row is None else StoredApproval(*row[:-1])

    def pending(self) -> tuple[int, int]:
        """See `core.edits.StoredApprovals`."""
        count, size = self._connection.execute(_PENDING).fetchone()
        return count, size

    def add(self, row: StoredApproval) -> None:
        """See `core.edits.StoredApprovals`."""
        self._connection.execute("INSERT INTO approvals VALUES (?, ?, ?, ?, ?, ?)", (*row, row_checksum(*row)))

    def resolve(self, row: StoredApproval) -> None:
        """See `core.edits.StoredApprovals`."""
        self._connection.execute(
            "UPDATE approvals SET resolved_at_ms = ?, approval = ?, checksum = ? WHERE id = ?",
            (row.resolved_at_ms, row.approval, row_checksum(*row), row.id),
        )

    def forget(self, but: str, keep: int, keep_bytes: int) -> list[str]:
        """See `core.edits.StoredApprovals`."""
        kept, taken = 1, self._connection.execute(_LENGTH, (but,)).fetchone()[0]
        gone = []
        for id_, length in self._connection.execute(_RESOLVED, (but,)).fetchall():
            kept, taken = kept + 1, taken + length
            if (kept > keep or taken > keep_bytes) and self._is_sound(id_):
                gone.append(id_)
        self._connection.executemany("DELETE FROM approvals WHERE id = ?", [(id_,) for id_ in gone])
        return gone

    def _is_sound(self, id_: str) -> bool:
        """A damaged one says nothing of its age: it stays, for whoever looks it up to be told."""
        row = self._connection.execute("SELECT * FROM approvals WHERE id = ?", (id_,)).fetchone()
        return row is not None and row_checksum(*row[:-1]) == row[-1]


def read_approvals(connection: sqlite3.Connection) -> list[StoredApproval]:
    """All that are stored.

    Raises:
        Damaged: the row of one is not what was stored.
    """
    found = []
    for *values, stored in connection.execute("SELECT * FROM approvals"):
        if row_checksum(*values) != stored:
            raise Damaged(f"the row of the approval {values[0]!r} is damaged")
        found.append(StoredApproval(*values))
    return found
