"""What an edit finds, and changes, within the writer's transaction."""

import sqlite3

from carserver.config import Settings
from carserver.stores.approvals import ApprovalRows
from carserver.stores.handles import HandleRows
from carserver.stores.imports import ImportRows
from carserver.stores.outputs import OutputRows
from carserver.stores.receipts import ReceiptRows
from carserver.stores.runrows import RunRows


class StoredRows:
    """Implements `core.edits.Stored`."""

    def __init__(self, connection: sqlite3.Connection, settings: Settings, runs: RunRows) -> None:
        self.runs = runs
        self.outputs = OutputRows(connection)
        self.handles = HandleRows(connection)
        self.receipts = ReceiptRows(connection)
        self.approvals = ApprovalRows(connection)
        self.imports = ImportRows(connection, settings, runs)
