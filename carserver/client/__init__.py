"""The Python client of carserver: `connect` for one connection, `trace` for a run's live log through reconnects."""

from carserver.client.connection import Connection, Notification, connect
from carserver.client.errors import (
    CallError,
    CallTimeout,
    ClientError,
    ConnectionLost,
    NotAuthorised,
    TraceClosed,
    TraceReset,
    Unreachable,
)
from carserver.client.pauses import Pauses
from carserver.client.trace import Traced, trace

__all__ = [
    "CallError",
    "CallTimeout",
    "ClientError",
    "Connection",
    "ConnectionLost",
    "NotAuthorised",
    "Notification",
    "Pauses",
    "TraceClosed",
    "TraceReset",
    "Traced",
    "Unreachable",
    "connect",
    "trace",
]
