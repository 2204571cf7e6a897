"""What runs a tool, as the core knows it: a host starts an execution, feeds its handle, and proves that it has ended.

The rules between the two (contract, section 6):

- `ToolHost.start` never raises and never waits; what goes wrong is said through the feed.
- A host feeds chunks in order. What it says after the handle is sealed is ignored, so it need not ask before it speaks.
- `Execution.stop` is called at most once: the handle was sealed by the daemon (cancel, deadline, its run or its invoker
  gone, a chunk that is none), so all of it is to end.
- Every execution ends with one `Feed.gone`, when nothing of it lives, or one `Feed.survives`, when that could not be
  seen in time; before or after the handle is sealed. One that is gone while its handle runs has closed its stream.
"""

from typing import Protocol

from msgspec import Struct

from carserver.protocol.errors import RpcError
from carserver.protocol.tools import ErrorChunk, GivenChunk

CLOSED = "tool stream closed without a terminal chunk"


class Call(Struct, frozen=True, kw_only=True):
    """What is to be run. `parameters` is a JSON object, compact, valid by the tool's schema; `request_id` is random.

    `attempt` counts the tries of the same action of a proposal, from 1.
    """

    handle: str
    request_id: str
    tool: str
    parameters: bytes
    action_id: str
    timeout_ms: int | None = None
    run_id: str | None = None
    attempt: int = 1


class TerminalError(ErrorChunk, frozen=True, kw_only=True):
    """The end: it failed, and its host says that trying again, or going on, will not help."""


class Exit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a command that ended well and gave none itself: its exit code, and how long it ran."""

    exit_code: int
    duration_ms: int


class Feed(Protocol):
    """Where a host tells of one execution."""

    @property
    def over(self) -> bool:
        """Whether its handle is sealed, or about to be: nothing that is said now is heard."""
        ...

    def take(self, chunk: GivenChunk, exit_code: int | None = None) -> None:
        """The next chunk; `done` and `error` are the last. Its size is checked, and text is split, by whoever takes it.

        `exit_code` is that of a command, with the last chunk.
        """
        ...

    def close(self, why: str = CLOSED) -> None:
        """The stream has ended without a last chunk: the handle fails."""
        ...

    def gone(self) -> None:
        """Nothing of it lives."""
        ...

    def survives(self) -> None:
        """Something of it may still live: it was killed, and did not go in time; or it is out of reach."""
        ...


class Execution(Protocol):
    """One that was started."""

    def stop(self, reason: str) -> None:
        """It is to end; `reason` is for people."""
        ...


class ToolHost(Protocol):
    """Runs tools."""

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        """Why it cannot take this one; None if it can. Asked before anything starts.

        `admitted`: it was asked before, and what has to be durable is by now. Then a host that can let it wait does.

        `overloaded` where it may later, `unavailable` where its host is gone, `limit_exceeded` or `invalid_params`
        where the arguments are at fault.
        """
        ...

    def start(self, call: Call, feed: Feed) -> Execution:
        """Starts it."""
        ...
