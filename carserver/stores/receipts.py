"""Receipts of cancels as rows: the same key has the same receipt for as long as its run is there.

So a receipt that is not found must not be one that a flipped bit hides (`lookups`).
"""

import sqlite3

from carserver.core.edits import KeptReceipt
from carserver.stores.lookups import find_row
from carserver.stores.schema import row_checksum


class ReceiptRows:
    """Implements `core.edits.StoredReceipts`; used in the writer's thread alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, owner: str, key: str) -> KeptReceipt | None:
        """See `core.edits.StoredReceipts`."""
        row = find_row(self._connection, "receipts", (owner, key))
        if row is None:
            return None
        owner, key, no, digest, final, receipt, _ = row
        return KeptReceipt(owner, key, no, digest, bool(final), receipt)

    def put(self, kept: KeptReceipt) -> None:
        """See `core.edits.StoredReceipts`."""
        values = (*kept[:4], int(kept.final), kept.receipt)
        self._connection.execute("REPLACE INTO receipts VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, row_checksum(*values)))
