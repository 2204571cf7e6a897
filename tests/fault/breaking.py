"""A method module for `serve --methods`: breaks the daemon's disk from within, as no test can from outside."""

import sqlite3
from typing import Any

from carserver.rpc.method import method
from carserver.rpc.session import Session


class _FailingFsync:
    """The writer's connection on a disk that does not confirm."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, *args: Any) -> Any:
        if sql == "COMMIT":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return self._connection.execute(sql, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@method("test.break_fsync")
def break_fsync(session: Session) -> None:
    """From now on every fsync fails."""
    log: Any = session.services.runs._log
    log._writer._connection = _FailingFsync(log._writer._connection)
