"""What an edit finds, and changes, within the writer's transaction."""

import sqlite3

from carserver.config import Settings
from carserver.stores.runrows import RunRows


class StoredRows:
    """Implements `core.edits.Stored`."""

    def __init__(self, connection: sqlite3.Connection, settings: Settings, runs: RunRows) -> None:
        self.runs = runs
