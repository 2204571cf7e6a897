"""`tools.*` of the daemon, typed, blocking: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""
# ruff: noqa: A002 - params have the names that they have on the wire

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from carserver.client.calls import BlockingCalls, given
from carserver.protocol.tools import (
    AllCancelled,
    Called,
    ChunkTaken,
    GivenTool,
    HandleList,
    HandlePoll,
    HandleStatus,
    Invoked,
    StreamSubscribed,
    StreamUnsubscribed,
    ToolCancelled,
    ToolList,
    Unregistered,
)


class Tools:
    """`tools.*`."""

    def __init__(self, calls: BlockingCalls) -> None:
        self._calls = calls

    def register(self, values: Sequence[GivenTool | dict[str, Any]]) -> int:
        """Hosts tools on this connection, all of the array or none; the answer is their number.

        Whoever invokes one of them, this connection is sent the request `tools.execute`. One's own tool of the same
        name is replaced; a name of another live connection, or of the tools file, is a `conflict` (`name_taken`). They
        are hosted until they are unregistered or the connection ends.

        `parameters` and `returns` are JSON Schemas, of drafts 4 to 2020-12 (`$schema`; else the latest); `format` is
        not checked. What a schema refers to stands in it (`#/$defs/path`), and its patterns have no look-around and no
        back-references: they are matched in linear time.

        Raises:
            CallError: `conflict`, and what any call may raise.
        """
        answer: int = self._calls.call("tools.register", values, result_type=int, again=True)
        return answer

    def unregister(self, name: str) -> Unregistered:
        """Hosts a tool no longer: one's own, of this connection. What was invoked goes on."""
        answer: Unregistered = self._calls.call(
            "tools.unregister", {"name": name}, result_type=Unregistered, again=True
        )
        return answer

    def list(self) -> ToolList:
        """All tools that may be invoked now, by name.

        `source` is `client` where a connection hosts it, `process` where the daemon runs a command for it.
        """
        answer: ToolList = self._calls.call("tools.list", None, result_type=ToolList, again=True)
        return answer

    def invoke(
        self,
        tool: str,
        *,
        parameters: Any = UNSET,
        action_id: str = "",
        run_id: str | None = None,
        timeout_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> Invoked:
        """Starts a tool and answers at once with its handle, a name of 32 hex characters.

        `parameters` are checked against the tool's schema before anything runs. `timeout_ms` is a deadline, after which
        the handle fails; a tool of the tools file may have a shorter one of its own. With `run_id`, a live run of one's
        own, the tool's start, output and end are recorded there. The same `idempotency_key` with the same other params
        gives the same handle for 24 hours, whatever was restarted meanwhile; where that is forgotten it is a `conflict`
        (`exists`), never a second execution.

        A handle without a live run is cancelled when the connection that invoked it has ended and nobody of its
        principal has polled it for the grace (30 s).

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Invoked = self._calls.call(
            "tools.invoke",
            given(
                {"tool": tool, "parameters": parameters, "action_id": action_id},
                run_id=run_id,
                timeout_ms=timeout_ms,
                idempotency_key=idempotency_key,
            ),
            result_type=Invoked,
            again=idempotency_key is not None,
        )
        return answer

    def call(
        self,
        tool: str,
        *,
        parameters: Any = UNSET,
        action_id: str = "",
        run_id: str | None = None,
        timeout_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> Called:
        """Starts a tool as `tools.invoke` does, and answers when it has ended, with what it came to.

        What it wrote is not in the answer, and of a command that is all but its exit code: `tools.poll` has that.

        Without an `idempotency_key` the handle is cancelled when this connection ends first. With one the same call on
        another connection waits for the same handle, which is cancelled when nobody has come for it within the grace.

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Called = self._calls.call(
            "tools.call",
            given(
                {"tool": tool, "parameters": parameters, "action_id": action_id},
                run_id=run_id,
                timeout_ms=timeout_ms,
                idempotency_key=idempotency_key,
            ),
            result_type=Called,
            again=idempotency_key is not None,
        )
        return answer

    def poll(self, handle: str, *, wait_ms: int = 0, after: int | None = None) -> HandlePoll | None:
        """What there is of a handle by now; null where it is unknown, or forgotten.

        A poll takes the chunks that wait; beyond 1,024, or 1 MiB, the oldest go, and the next poll tells how many
        (`dropped_chunks`). With `wait_ms` it is answered at the first news. The first poll that sees the end is
        followed by one more answer; then the handle is forgotten.

        With `after`, a chunk's sequence, nothing is lost with a connection: the answer has the chunks from there on and
        their `first_sequence`, only those before it are freed, and a finished handle stays. Ask next with
        `first_sequence` and the number of chunks, added. What the host polls of somebody else's stays as it is.
        """
        answer: HandlePoll | None = self._calls.call(
            "tools.poll",
            given({"handle": handle, "wait_ms": wait_ms}, after=after),
            result_type=HandlePoll | None,
            again=after is not None,
        )
        return answer

    def cancel(self, handle: str, *, wait_ms: int = 0) -> ToolCancelled:
        """Cancels a handle: one's own, any for the host. `cancelled` is true for one that is known, finished or not.

        The handle is `cancelled` at once, and `cancel` says how far the stop is: `requested`, then `confirmed` when
        nothing of the tool lives, or `unconfirmed` where that could not be seen in time (for a process: 2 s after it
        was killed). With `wait_ms` it is answered when that is decided.
        """
        answer: ToolCancelled = self._calls.call(
            "tools.cancel", {"handle": handle, "wait_ms": wait_ms}, result_type=ToolCancelled, again=True
        )
        return answer

    def cancel_all(self) -> AllCancelled:
        """Cancels all of one's own live handles; how many these were."""
        answer: AllCancelled = self._calls.call("tools.cancel_all", None, result_type=AllCancelled, again=False)
        return answer

    def status(self, handle: str) -> HandleStatus | None:
        """The status of a handle, and how far its stop is if the daemon stopped it; null where it is unknown.

        It takes nothing, and does not count as a poll.
        """
        answer: HandleStatus | None = self._calls.call(
            "tools.status", {"handle": handle}, result_type=HandleStatus | None, again=True
        )
        return answer

    def handles(self, *, all: bool = False) -> HandleList:
        """One's own live handles, oldest first; with `all`, which is for the host, everyone's and whose they are.

        Raises:
            CallError: `forbidden`, and what any call may raise.
        """
        answer: HandleList = self._calls.call("tools.handles", {"all": all}, result_type=HandleList, again=True)
        return answer

    def stream_subscribe(self, *, handle: str | None = None) -> StreamSubscribed:
        """Sends the chunks of a handle as they come, by `tools.stream.event`; without `handle`, of all that one sees.

        These are one's own, everyone's for the host, those to come included. It begins after the reply: a poll has what
        was before. For an unknown handle, and one that has ended, nothing follows. A handle's stream ends with its last
        chunk (`done` or `error`).

        It is best effort: where more than 256 chunks wait for a connection, the oldest are left out. A gap in
        `sequence` shows that, and `tools.poll` with `after` has them, as far as the handle keeps them. A chunk comes
        once on a connection, however often it was asked for.
        """
        answer: StreamSubscribed = self._calls.call(
            "tools.stream.subscribe", given({}, handle=handle), result_type=StreamSubscribed, again=True
        )
        return answer

    def stream_unsubscribe(self, *, handle: str | None = None) -> StreamUnsubscribed:
        """Ends what a `tools.stream.subscribe` with the same params began; `removed`: whether there was anything."""
        answer: StreamUnsubscribed = self._calls.call(
            "tools.stream.unsubscribe", given({}, handle=handle), result_type=StreamUnsubscribed, again=True
        )
        return answer

    def chunk(self, request_id: str, chunk: Any) -> ChunkTaken:
        """The next piece of the stream of a `tools.execute` that this connection was sent and has not answered.

        `chunk` is `{kind: "text", text, stream?: "stderr"}`, `{kind: "data", data}`, `{kind: "progress", fraction,
        message?}`, `{kind: "done", result?}` or `{kind: "error", message}`; the last two end the stream, and the
        request is to be answered all the same. Text of any length is split into chunks of 64 KiB; another chunk that is
        larger, or none of these, fails the call. Sent as a notification, mostly; `taken` is false where there is no
        such request on this connection: it is counted, and ignored.
        """
        answer: ChunkTaken = self._calls.call(
            "tools.chunk", {"request_id": request_id, "chunk": chunk}, result_type=ChunkTaken, again=False
        )
        return answer
