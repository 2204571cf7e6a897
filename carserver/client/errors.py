"""What can go wrong between a client and the daemon. No message here ever holds a token."""

from collections.abc import Mapping
from typing import Any

from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind

_INCURABLE = frozenset(
    {
        *(Close.NORMAL, Close.PROTOCOL_ERROR, Close.UNSUPPORTED_DATA),
        *(Close.INVALID_DATA, Close.POLICY, Close.TOO_BIG),
    }
)
_AGAIN = frozenset({ErrorKind.DEADLINE_EXCEEDED.type, ErrorKind.OVERLOADED.type, ErrorKind.UNAVAILABLE.type})

_SHOWN = 120  # bytes of an event in a message


class ClientError(Exception):
    """Everything that this package raises."""

    @property
    def passing(self) -> bool:
        """Whether the same again, on a new connection and with the same key, may well succeed a little later."""
        return False


class Unreachable(ClientError):
    """No connection came about: nobody listens there, or what listens is no carserver for us."""

    @property
    def passing(self) -> bool:
        """A daemon that is being restarted is away for a moment."""
        return True


class Misconfigured(ClientError):
    """An address, a token or a setting that was given cannot be used: the message names it."""


class FolderUnusable(ClientError):
    """The state folder's secrets cannot be used: another user's, open to others, or damaged."""


class NotAuthorised(ClientError):
    """The daemon refused the token of the upgrade (401)."""


class ConnectionLost(ClientError):
    """The connection ended, by either side; what was under way has an unknown outcome.

    `code` is the WebSocket's, 1006 where there was no closing handshake.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"connection lost ({code}{': ' if reason else ''}{reason})")
        self.code = code
        self.reason = reason

    @property
    def passing(self) -> bool:
        """Not where it was meant to end, or the same again would end the same way: a policy, a limit, a defect."""
        return self.code not in _INCURABLE


class CallTimeout(ClientError, TimeoutError):
    """No answer in time; the outcome is unknown, the connection lives on."""

    @property
    def passing(self) -> bool:
        """What did not answer may be a connection that died unnoticed."""
        return True


class CallError(ClientError):
    """The daemon answered with an error (contract, section 4): `type` is its stable name, `data` has the details."""

    def __init__(self, code: int, type_: str, message: str, data: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.code = code
        self.type = type_
        self.message = message
        self.data = data

    @property
    def passing(self) -> bool:
        """Overloaded, draining, slow or full: the daemon says so."""
        return self.type in _AGAIN


class TraceReset(ClientError):
    """The log at the other end is not the one that was being read: what was delivered so far is of another one."""


class TraceClosed(ClientError):
    """The run's stream cannot go on (it was deleted): `reason` is the daemon's."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(f"the trace of {run_id} was closed: {reason}")
        self.run_id = run_id
        self.reason = reason


class BufferFull(ClientError):
    """The buffer of a run has no room: the daemon is away or slow. `taken` of the events of this call were taken in."""

    def __init__(self, message: str, taken: int = 0) -> None:
        super().__init__(message)
        self.taken = taken


class EventRefused(ClientError):
    """The daemon did not store this event (those beside it, it did): `event` is its JSON, `events` how many there are.

    It was recorded earlier: what raises this has not taken in anything of its own.
    """

    def __init__(self, event: bytes, why: str) -> None:
        super().__init__(event, why)
        self.event = event
        self.why = why
        self.events = 1

    def __str__(self) -> str:
        more = f" (and {self.events - 1} more)" if self.events > 1 else ""
        shown = self.event[:_SHOWN].decode("utf-8", "replace")
        return f"an event was refused: {self.why}: {shown}{'…' if len(self.event) > _SHOWN else ''}{more}"


class NotRecorded(ClientError):
    """The recording of a run broke off, or is not done in time: `events` were not acknowledged, `why` says why."""

    def __init__(self, run_id: str, events: int, why: str) -> None:
        what = "1 event of" if events == 1 else f"{events} events of" if events else "the end of"
        super().__init__(f"{what} {run_id} {'were' if events > 1 else 'was'} not recorded: {why}")
        self.run_id = run_id
        self.events = events
        self.why = why


class RunOver(ClientError):
    """The run cannot be gone on with: it is over, or its block has ended."""
