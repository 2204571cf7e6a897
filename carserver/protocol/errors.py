"""The errors that cross the wire: the one table of codes and names, and the one exception that carries them.

Contract, section 4. `data.type` is the stable name; the message is for a person and names the field or the value.
"""

from enum import Enum
from typing import Any

_SHOWN = 256  # characters of a foreign name in a message


class ErrorKind(Enum):
    """One row of the table: its value is `(code, data.type, when)`."""

    PARSE_ERROR = (-32700, "parse_error", "the message is not JSON")
    INVALID_REQUEST = (-32600, "invalid_request", "JSON, but not a JSON-RPC 2.0 request")
    METHOD_NOT_FOUND = (-32601, "method_not_found", "no such method")
    INVALID_PARAMS = (-32602, "invalid_params", "a parameter is missing or wrong; `path` names it")
    INTERNAL_ERROR = (-32603, "internal_error", "a defect of the daemon; its log has the same `incident`")
    AUTH_REQUIRED = (-32001, "auth_required", "a call before `session.auth`; the connection is closed with 1008")
    AUTH_FAILED = (-32001, "auth_failed", "a wrong token; the connection stays open")
    FORBIDDEN = (-32003, "forbidden", "visible, but not allowed to this principal")
    DEADLINE_EXCEEDED = (-32004, "deadline_exceeded", "storage did not answer in time; the outcome is unknown")
    VERSION_MISMATCH = (-32006, "version_mismatch", "`server.handshake` asks for a version that is not served")
    CAPABILITY_MISSING = (-32008, "capability_missing", "`server.handshake` requires a capability that there is not")
    NOT_FOUND = (-32010, "not_found", "unknown, or not visible to this principal")
    CONFLICT = (-32011, "conflict", "what is stored disagrees; `reason` says how")
    LIMIT_EXCEEDED = (-32012, "limit_exceeded", "over a limit: `limit`, `value`, `maximum`")
    OVERLOADED = (-32013, "overloaded", "too much at once; come back after `retry_after_ms`")
    UNAVAILABLE = (-32014, "unavailable", "storage fails or the daemon drains; `outcome` is not_done or unknown")

    def __init__(self, code: int, type_: str, when: str) -> None:
        self.code = code
        self.type = type_
        self.when = when


class RpcError(Exception):
    """An error to be sent: its kind, a message for a person, and the members of `data` beside `type`."""

    def __init__(self, kind: ErrorKind, message: str, **data: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.data = data

    def to_wire(self) -> dict[str, Any]:
        """The `error` member of a reply."""
        return {"code": self.kind.code, "message": self.message, "data": {"type": self.kind.type, **self.data}}


def invalid_params(path: str, message: str) -> RpcError:
    """`path` is the place below params (`events[3].type`); empty where the whole of them is meant."""
    return RpcError(ErrorKind.INVALID_PARAMS, f"{path or 'params'}: {message}", path=path)


def not_found(what: str, name: str) -> RpcError:
    """`what` is run, output, handle, tool or the like. The same words for what is unknown and for what is not yours."""
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
    return RpcError(ErrorKind.NOT_FOUND, f"unknown {what} {shown!r}", what=what)


def forbidden(message: str) -> RpcError:
    """For what the principal may see but not do."""
    return RpcError(ErrorKind.FORBIDDEN, message)


def conflict(reason: str, message: str, **data: Any) -> RpcError:
    """`reason` is one of the contract's words, such as key_reused, batch_reused, sequence, run_terminal."""
    return RpcError(ErrorKind.CONFLICT, message, reason=reason, **data)


def limit_exceeded(limit: str, value: int, maximum: int, where: str = "") -> RpcError:
    """`limit` is the setting's name, `where` the place of the value, if it has one."""
    place = f"{where}: " if where else ""
    return RpcError(
        ErrorKind.LIMIT_EXCEEDED,
        f"{place}{value} is more than {limit} allows ({maximum})",
        limit=limit,
        value=value,
        maximum=maximum,
    )


def overloaded(message: str, retry_after_ms: int) -> RpcError:
    """Nothing was started; the same request may be sent again."""
    return RpcError(ErrorKind.OVERLOADED, message, retry_after_ms=retry_after_ms)


def unavailable(message: str, *, outcome: str = "not_done", **data: Any) -> RpcError:
    """`outcome` is `not_done`, or `unknown`: then the same `batch_id` or key makes sending it again harmless."""
    return RpcError(ErrorKind.UNAVAILABLE, message, outcome=outcome, **data)
