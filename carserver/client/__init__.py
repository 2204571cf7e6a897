"""The Python client of carserver: `connect` for a `Car`, which finds the daemon and stays connected.

`carserver.client.sync` is its twin for programs without an event loop. Beneath both: `open_connection` for one
connection that is not kept up, and `trace.trace` on such.

Everything is imported when it is first asked for, so that a program pays for what it uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carserver.client.car import Car, connect
    from carserver.client.connection import Connection, Notification, Request, open_connection
    from carserver.client.current import current_run
    from carserver.client.errors import (
        BufferFull,
        CallError,
        CallTimeout,
        ClientError,
        ConnectionLost,
        EventRefused,
        FolderUnusable,
        Misconfigured,
        NotAuthorised,
        NotRecorded,
        RunOver,
        TraceClosed,
        TraceReset,
        Unreachable,
    )
    from carserver.client.execution import Progress, Result, progress
    from carserver.client.logs import LoggingHandler, recorded
    from carserver.client.pauses import Pauses
    from carserver.client.run import Run, RunCancelled
    from carserver.client.trace import Traced

__all__ = [
    "BufferFull",
    "CallError",
    "CallTimeout",
    "Car",
    "ClientError",
    "Connection",
    "ConnectionLost",
    "EventRefused",
    "FolderUnusable",
    "LoggingHandler",
    "Misconfigured",
    "NotAuthorised",
    "NotRecorded",
    "Notification",
    "Pauses",
    "Progress",
    "Request",
    "Result",
    "Run",
    "RunCancelled",
    "RunOver",
    "TraceClosed",
    "TraceReset",
    "Traced",
    "Unreachable",
    "connect",
    "current_run",
    "open_connection",
    "progress",
    "recorded",
]

_NAMES = {
    "car": ["Car", "connect"],
    "connection": ["Connection", "Notification", "Request", "open_connection"],
    "current": ["current_run"],
    "errors": [
        "BufferFull",
        "CallError",
        "CallTimeout",
        "ClientError",
        "ConnectionLost",
        "EventRefused",
        "FolderUnusable",
        "Misconfigured",
        "NotAuthorised",
        "NotRecorded",
        "RunOver",
        "TraceClosed",
        "TraceReset",
        "Unreachable",
    ],
    "execution": ["Progress", "Result", "progress"],
    "logs": ["LoggingHandler", "recorded"],
    "pauses": ["Pauses"],
    "run": ["Run", "RunCancelled"],
    "trace": ["Traced"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
