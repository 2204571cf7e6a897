"""Running a command's conversation with the daemon, and saying how it failed."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Raw

from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.plain import visible
from carserver.client import (
    CallError,
    CallTimeout,
    ClientError,
    ConnectionLost,
    NotAuthorised,
    Unreachable,
)

if TYPE_CHECKING:
    from carserver.client.trace import Opener

T = TypeVar("T")

ANSWER_S = 30.0  # the daemon's storage answers within 25 s or says so

_CODES = {
    "not_found": ExitCode.NOT_FOUND,
    "auth_required": ExitCode.NOT_AUTHORISED,
    "auth_failed": ExitCode.NOT_AUTHORISED,
    "forbidden": ExitCode.NOT_AUTHORISED,
    "deadline_exceeded": ExitCode.TIMED_OUT,
}
_NO_TOKEN = (
    "no token was found: name the daemon's folder with --state-dir, or set CARSERVER_AUTH_TOKEN, and for what the host"  # noqa: S105
    " alone may do CARSERVER_HOST_TOKEN"
)


def talk(conversation: Coroutine[Any, Any, T]) -> T:
    """Runs a conversation to its end.

    Raises:
        CommandError: what went wrong, with its exit code.
    """
    try:
        return asyncio.run(conversation)
    except ClientError as error:
        raise explained(error) from None


def ask(open_connection: "Opener", method: str, params: Mapping[str, Any]) -> Raw:
    """One question, and its answer as it came.

    Raises:
        CommandError: what went wrong, with its exit code.
    """

    async def conversation() -> Raw:
        async with open_connection() as connection:
            return await connection.call(method, params, ANSWER_S, result_type=Raw)

    return talk(conversation())


def explained(error: ClientError) -> CommandError:
    """An error of the client as the end of a command: what happened, and what to do."""
    message = visible(str(error))
    match error:
        case CallError(type="auth_required"):
            return CommandError(_NO_TOKEN, ExitCode.NOT_AUTHORISED)
        case CallError():
            return CommandError(message, _CODES.get(error.type, ExitCode.RUNTIME))
        case NotAuthorised():
            return CommandError(f"{message}; is it another daemon's, or an old one?", ExitCode.NOT_AUTHORISED)
        case Unreachable() | ConnectionLost():
            return CommandError(message, ExitCode.UNREACHABLE)
        case CallTimeout():
            return CommandError(f"{message}; its outcome is unknown", ExitCode.TIMED_OUT)
    return CommandError(message)
