"""The daemon's methods, typed: a class for each namespace, made on anything that calls.

*Generated from the daemon's method table by `scripts/docs`; do not edit.* What is left out (None, or UNSET where null
means something) is not sent. `Any` is any JSON value, `msgspec.Raw` included. Results have JSON of any shape as
`msgspec.Raw`, by the bytes that came; `msgspec.json.decode` makes a value of it.
"""
# ruff: noqa: A002 - params have the names that they have on the wire

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from carserver.client.calls import Calls, given
from carserver.protocol.outputs import (
    Appended,
    GivenArtifact,
    GivenFinal,
    GivenPartial,
    OutputPage,
    OutputRecord,
    OutputSlice,
    Progress,
)
from carserver.protocol.pruning import Pruned
from carserver.protocol.runs import (
    Cancelled,
    Deleted,
    EventPage,
    Recorded,
    RunPage,
    Snapshot,
    Status,
    Subscribed,
    Unsubscribed,
    Unwatched,
    Watching,
)
from carserver.protocol.server import Authenticated, BackedUp, Pong, ServerStatus
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
from carserver.protocol.transfer import Imported

AGAIN: Mapping[str, bool | str] = {
    "session.auth": True,
    "runs.create": "idempotency_key",
    "runs.record": "batch_id",
    "runs.get": True,
    "runs.events": True,
    "runs.list": True,
    "runs.fail": True,
    "runs.cancel": True,
    "runs.resume": True,
    "runs.trace.subscribe": True,
    "runs.trace.unsubscribe": True,
    "runs.watch": True,
    "runs.unwatch": True,
    "tools.register": True,
    "tools.unregister": True,
    "tools.list": True,
    "tools.invoke": "idempotency_key",
    "tools.call": "idempotency_key",
    "tools.poll": "after",
    "tools.cancel": True,
    "tools.status": True,
    "tools.handles": True,
    "tools.stream.subscribe": True,
    "tools.stream.unsubscribe": True,
    "outputs.append": "idempotency_key",
    "outputs.get": True,
    "outputs.latest": True,
    "outputs.list": True,
    "outputs.read": True,
    "rpc.discover": True,
    "server.status": True,
    "server.ping": True,
}
"""What may be sent again where the answer was lost: nothing more comes of twice than of once. A name is that of the
param with which it is so."""


class Session:
    """`session.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def auth(
        self, *, token: str | None = None, agent_id: str | None = None, host_token: str | None = None
    ) -> Authenticated:
        """Authenticates the connection, unless the upgrade request did already.

        `token` is the auth token (role `client`) or an agent's token (role `agent`); `agent_id` beside an agent's token
        must match it, beside the auth token it is ignored. `host_token` gives the role `host`. A wrong token is
        answered after a second with `auth_failed` and may be tried again on the same connection; a connection that
        authenticates again as somebody else is `forbidden`, but on a Unix socket, where it acts as `client` from the
        start, it is not: there, what it subscribed to or watched until then ends, with `runs.trace.closed` or
        `runs.watch.reset`.

        Raises:
            CallError: `auth_failed`, `forbidden`, and what any call may raise.
        """
        answer: Authenticated = await self._calls.call(
            "session.auth",
            given({}, token=token, agent_id=agent_id, host_token=host_token),
            result_type=Authenticated,
            again=True,
        )
        return answer


class Runs:
    """`runs.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def create(
        self,
        prompt: str,
        *,
        session_id: str = "",
        agent_id: str | None = None,
        parent_run_id: str | None = None,
        outcome_description: str | None = None,
        metadata: Any = UNSET,
        idempotency_key: str | None = None,
    ) -> Snapshot:
        """Creates a run, which the caller's connection attends from then on.

        With an `idempotency_key` the run's id follows from it: the same key with the same other params gives the same
        run, with others a `conflict` (`key_reused`). An agent's runs carry its id; a client may name any, which grants
        nothing.

        Raises:
            CallError: `conflict`, and what any call may raise.
        """
        answer: Snapshot = await self._calls.call(
            "runs.create",
            given(
                {"prompt": prompt, "session_id": session_id, "metadata": metadata},
                agent_id=agent_id,
                parent_run_id=parent_run_id,
                outcome_description=outcome_description,
                idempotency_key=idempotency_key,
            ),
            result_type=Snapshot,
            again=idempotency_key is not None,
        )
        return answer

    async def record(
        self,
        run_id: str,
        events: Sequence[Any],
        *,
        at_ms: Sequence[int] | None = None,
        expected_sequence: int | None = None,
        batch_id: str | None = None,
    ) -> Recorded:
        """Appends 1 to 1,000 events to a run of one's own: all, or none. The answer means that they are durable.

        An event is an object with a string `type`; it is kept and delivered by the very bytes it came in. `batch_id`
        makes a resend harmless: the same events again get the first answer again, others a `conflict` (`batch_reused`).
        `expected_sequence` is for a single writer: a `conflict` (`sequence`) says where the log is. `at_ms` has one
        time per event, clamped between the last event's time and now. An interrupted run goes on; the log of a run that
        has a final status takes late events, and its status stays.

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Recorded = await self._calls.call(
            "runs.record",
            given(
                {"run_id": run_id, "events": events},
                at_ms=at_ms,
                expected_sequence=expected_sequence,
                batch_id=batch_id,
            ),
            result_type=Recorded,
            again=batch_id is not None,
        )
        return answer

    async def get(self, run_id: str) -> Snapshot:
        """The snapshot of a run: its state now.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: Snapshot = await self._calls.call("runs.get", {"run_id": run_id}, result_type=Snapshot, again=True)
        return answer

    async def events(
        self, run_id: str, *, after: int = 0, limit: int | None = None, types: Sequence[str] | None = None
    ) -> EventPage:
        """A page of a run's log, from the cursor `after`, of these `types` if given.

        At most 1,000 entries or 1 MiB, at least one entry. `cursor` is past the last entry looked at (a filtered call
        looks at 10,000 at most), `has_more` whether the log goes on there.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: EventPage = await self._calls.call(
            "runs.events",
            given({"run_id": run_id, "after": after}, limit=limit, types=types),
            result_type=EventPage,
            again=True,
        )
        return answer

    async def list(
        self,
        *,
        session_id: str | None = None,
        agent_id: str | None = None,
        status: Status | None = None,
        parent_run_id: str | None = None,
        created_after_ms: int | None = None,
        created_before_ms: int | None = None,
        limit: int | None = None,
        page: str | None = None,
    ) -> RunPage:
        """Runs, newest first: one's own, or all of them for the host.

        At most `limit` (100; up to 1,000) or 1 MiB. `next_page` asks for the next page; it carries the filters, so it
        is sent alone, or with the same ones.
        """
        answer: RunPage = await self._calls.call(
            "runs.list",
            given(
                {},
                session_id=session_id,
                agent_id=agent_id,
                status=status,
                parent_run_id=parent_run_id,
                created_after_ms=created_after_ms,
                created_before_ms=created_before_ms,
                limit=limit,
                page=page,
            ),
            result_type=RunPage,
            again=True,
        )
        return answer

    async def fail(self, run_id: str, error: str) -> Snapshot:
        """Fails a run of one's own; one that has a final status stays as it is.

        Raises:
            CallError: `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Snapshot = await self._calls.call(
            "runs.fail", {"run_id": run_id, "error": error}, result_type=Snapshot, again=True
        )
        return answer

    async def cancel(self, run_id: str, *, reason: str = "cancelled by host") -> Cancelled:
        """Cancels a run: one's own, any for the host. Who attends it gets `runs.cancelled`.

        `cancelled` is false where the run had a final status already.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: Cancelled = await self._calls.call(
            "runs.cancel", {"run_id": run_id, "reason": reason}, result_type=Cancelled, again=True
        )
        return answer

    async def resume(self, run_id: str) -> Snapshot:
        """Attends a run of one's own again; an interrupted one goes on. One with a final status: `conflict`.

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Snapshot = await self._calls.call("runs.resume", {"run_id": run_id}, result_type=Snapshot, again=True)
        return answer

    async def delete(self, run_id: str) -> Deleted:
        """Deletes a run of one's own that is over, with its outputs. A live one: `conflict` (`run_live`).

        Its viewers get `runs.trace.closed`. The same idempotency key makes a new run afterwards, with another epoch.

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Deleted = await self._calls.call("runs.delete", {"run_id": run_id}, result_type=Deleted, again=False)
        return answer

    async def trace_subscribe(self, run_id: str, *, cursor: int = 0, epoch: str | None = None) -> Subscribed:
        """Streams a run's log from `cursor` on, then live: every event once, in order, as `runs.trace.event`.

        The stream begins after the reply; from cursor 0 with the record `started`. Whenever the run is over it says so
        with the record `ended`. To go on after a lost connection, send the `cursor` of the last frame and the `epoch`
        of the subscription: `recovered` is true, and nothing is missing or repeated. Where the log is not that one any
        more, `recovered` is false and everything comes again from 0. A second subscription to the same run replaces the
        first.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: Subscribed = await self._calls.call(
            "runs.trace.subscribe",
            given({"run_id": run_id, "cursor": cursor}, epoch=epoch),
            result_type=Subscribed,
            again=True,
        )
        return answer

    async def trace_unsubscribe(self, run_id: str) -> Unsubscribed:
        """Ends the subscription to a run; `removed` is false where there was none."""
        answer: Unsubscribed = await self._calls.call(
            "runs.trace.unsubscribe", {"run_id": run_id}, result_type=Unsubscribed, again=True
        )
        return answer

    async def watch(
        self,
        *,
        session_id: str | None = None,
        agent_id: str | None = None,
        status: Status | None = None,
        parent_run_id: str | None = None,
        created_after_ms: int | None = None,
        created_before_ms: int | None = None,
    ) -> Watching:
        """Tells of every run that appears or changes, by `runs.changed` with its snapshot: one's own, all for the host.

        The params are the filters of `runs.list`. A run that is no longer meant because its status changed is told of
        once more. A run's newest snapshot takes the place of one that still waits, so a slow reader misses steps, never
        the last one. Where more than 1,024 runs wait, and where runs were deleted, `runs.watch.reset` comes instead:
        list again.

        Watch first, then list, and no change is missed. What `runs.changed` says of a run between the request and the
        answer of a list is newer than the list; after a `runs.watch.reset` there, ask for the list again. A second
        watch on a connection replaces the first.
        """
        answer: Watching = await self._calls.call(
            "runs.watch",
            given(
                {},
                session_id=session_id,
                agent_id=agent_id,
                status=status,
                parent_run_id=parent_run_id,
                created_after_ms=created_after_ms,
                created_before_ms=created_before_ms,
            ),
            result_type=Watching,
            again=True,
        )
        return answer

    async def unwatch(self) -> Unwatched:
        """Ends the watch; `removed` is false where there was none."""
        answer: Unwatched = await self._calls.call("runs.unwatch", None, result_type=Unwatched, again=True)
        return answer

    async def import_(self, lines: Sequence[Any]) -> Imported:
        """Takes in runs and outputs as `carserver export` writes them: up to 1,000 lines in their order, all or none.

        A line is `{run}` (a snapshot; its epoch is not looked at; with the `outcome` that it was completed with), a
        page of its events `{run_id, events: [{sequence, timestamp_ms, status, record?, event}]}` (`record` is `turn` or
        `model_turn` where the live trace has it as one), or `{output, size, sha256}`. A run appears with its last
        event, as the host's, in a log of another epoch; its lines may come in several calls, and a `{run}` line begins
        it anew. What is there with the same content is skipped, with other content it is a `conflict` (`exists`);
        `path` names the line.

        For the host.

        Raises:
            CallError: `conflict`, `forbidden`, and what any call may raise.
        """
        answer: Imported = await self._calls.call("runs.import", {"lines": lines}, result_type=Imported, again=False)
        return answer


class Tools:
    """`tools.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def register(self, values: Sequence[GivenTool | dict[str, Any]]) -> int:
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
        answer: int = await self._calls.call("tools.register", values, result_type=int, again=True)
        return answer

    async def unregister(self, name: str) -> Unregistered:
        """Hosts a tool no longer: one's own, of this connection. What was invoked goes on."""
        answer: Unregistered = await self._calls.call(
            "tools.unregister", {"name": name}, result_type=Unregistered, again=True
        )
        return answer

    async def list(self) -> ToolList:
        """All tools that may be invoked now, by name.

        `source` is `client` where a connection hosts it, `process` where the daemon runs a command for it.
        """
        answer: ToolList = await self._calls.call("tools.list", None, result_type=ToolList, again=True)
        return answer

    async def invoke(
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
        answer: Invoked = await self._calls.call(
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

    async def call(
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
        answer: Called = await self._calls.call(
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

    async def poll(self, handle: str, *, wait_ms: int = 0, after: int | None = None) -> HandlePoll | None:
        """What there is of a handle by now; null where it is unknown, or forgotten.

        A poll takes the chunks that wait; beyond 1,024, or 1 MiB, the oldest go, and the next poll tells how many
        (`dropped_chunks`). With `wait_ms` it is answered at the first news. The first poll that sees the end is
        followed by one more answer; then the handle is forgotten.

        With `after`, a chunk's sequence, nothing is lost with a connection: the answer has the chunks from there on and
        their `first_sequence`, only those before it are freed, and a finished handle stays. Ask next with
        `first_sequence` and the number of chunks, added. What the host polls of somebody else's stays as it is.
        """
        answer: HandlePoll | None = await self._calls.call(
            "tools.poll",
            given({"handle": handle, "wait_ms": wait_ms}, after=after),
            result_type=HandlePoll | None,
            again=after is not None,
        )
        return answer

    async def cancel(self, handle: str, *, wait_ms: int = 0) -> ToolCancelled:
        """Cancels a handle: one's own, any for the host. `cancelled` is true for one that is known, finished or not.

        The handle is `cancelled` at once, and `cancel` says how far the stop is: `requested`, then `confirmed` when
        nothing of the tool lives, or `unconfirmed` where that could not be seen in time (for a process: 2 s after it
        was killed). With `wait_ms` it is answered when that is decided.
        """
        answer: ToolCancelled = await self._calls.call(
            "tools.cancel", {"handle": handle, "wait_ms": wait_ms}, result_type=ToolCancelled, again=True
        )
        return answer

    async def cancel_all(self) -> AllCancelled:
        """Cancels all of one's own live handles; how many these were."""
        answer: AllCancelled = await self._calls.call("tools.cancel_all", None, result_type=AllCancelled, again=False)
        return answer

    async def status(self, handle: str) -> HandleStatus | None:
        """The status of a handle, and how far its stop is if the daemon stopped it; null where it is unknown.

        It takes nothing, and does not count as a poll.
        """
        answer: HandleStatus | None = await self._calls.call(
            "tools.status", {"handle": handle}, result_type=HandleStatus | None, again=True
        )
        return answer

    async def handles(self, *, all: bool = False) -> HandleList:
        """One's own live handles, oldest first; with `all`, which is for the host, everyone's and whose they are.

        Raises:
            CallError: `forbidden`, and what any call may raise.
        """
        answer: HandleList = await self._calls.call("tools.handles", {"all": all}, result_type=HandleList, again=True)
        return answer

    async def stream_subscribe(self, *, handle: str | None = None) -> StreamSubscribed:
        """Sends the chunks of a handle as they come, by `tools.stream.event`; without `handle`, of all that one sees.

        These are one's own, everyone's for the host, those to come included. It begins after the reply: a poll has what
        was before. For an unknown handle, and one that has ended, nothing follows. A handle's stream ends with its last
        chunk (`done` or `error`).

        It is best effort: where more than 256 chunks wait for a connection, the oldest are left out. A gap in
        `sequence` shows that, and `tools.poll` with `after` has them, as far as the handle keeps them. A chunk comes
        once on a connection, however often it was asked for.
        """
        answer: StreamSubscribed = await self._calls.call(
            "tools.stream.subscribe", given({}, handle=handle), result_type=StreamSubscribed, again=True
        )
        return answer

    async def stream_unsubscribe(self, *, handle: str | None = None) -> StreamUnsubscribed:
        """Ends what a `tools.stream.subscribe` with the same params began; `removed`: whether there was anything."""
        answer: StreamUnsubscribed = await self._calls.call(
            "tools.stream.unsubscribe", given({}, handle=handle), result_type=StreamUnsubscribed, again=True
        )
        return answer

    async def chunk(self, request_id: str, chunk: Any) -> ChunkTaken:
        """The next piece of the stream of a `tools.execute` that this connection was sent and has not answered.

        `chunk` is `{kind: "text", text, stream?: "stderr"}`, `{kind: "data", data}`, `{kind: "progress", fraction,
        message?}`, `{kind: "done", result?}` or `{kind: "error", message}`; the last two end the stream, and the
        request is to be answered all the same. Text of any length is split into chunks of 64 KiB; another chunk that is
        larger, or none of these, fails the call. Sent as a notification, mostly; `taken` is false where there is no
        such request on this connection: it is counted, and ignored.
        """
        answer: ChunkTaken = await self._calls.call(
            "tools.chunk", {"request_id": request_id, "chunk": chunk}, result_type=ChunkTaken, again=False
        )
        return answer


class Outputs:
    """`outputs.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def append(
        self,
        task_id: str,
        attempt: int,
        producer_agent: str,
        event: GivenArtifact | GivenFinal | GivenPartial | Progress | dict[str, Any],
        *,
        parent_refs: Sequence[str] | None = None,
        run_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Appended:
        """Stores an output, for everyone who is authenticated to read; the answer means that it is durable.

        `parent_refs` must exist, and be visible; `run_id` is a run of one's own, which the output is deleted with. The
        same `idempotency_key` with the same other params gives the same id, with others a `conflict` (`key_reused`).

        A file is named by its path below the daemon's file root. It is a plain file, no part of its path is a link, and
        it has no other name. All of it is read now, so append it when it is complete; if it changes meanwhile, that is
        a `conflict` (`file_changed`).

        Raises:
            CallError: `conflict`, `forbidden`, `not_found`, and what any call may raise.
        """
        answer: Appended = await self._calls.call(
            "outputs.append",
            given(
                {"task_id": task_id, "attempt": attempt, "producer_agent": producer_agent, "event": event},
                parent_refs=parent_refs,
                run_id=run_id,
                idempotency_key=idempotency_key,
            ),
            result_type=Appended,
            again=idempotency_key is not None,
        )
        return answer

    async def get(self, id: str) -> OutputRecord:
        """The whole record of an output; the content of a file is for `outputs.read`.

        The result of a handle is its owner's and the host's alone (`private`): for all others, of no method, there is
        none.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: OutputRecord = await self._calls.call("outputs.get", {"id": id}, result_type=OutputRecord, again=True)
        return answer

    async def latest(
        self,
        *,
        name: str | None = None,
        artifact: str | None = None,
        task_id: str | None = None,
        attempt: int | None = None,
    ) -> OutputRecord:
        """The newest output of the producer `name`, or the newest artifact of the name `artifact`: one of the two.

        Of all tasks, or of the task `task_id`, or of one `attempt` of it.

        Raises:
            CallError: `not_found`, and what any call may raise.
        """
        answer: OutputRecord = await self._calls.call(
            "outputs.latest",
            given({}, name=name, artifact=artifact, task_id=task_id, attempt=attempt),
            result_type=OutputRecord,
            again=True,
        )
        return answer

    async def list(
        self,
        *,
        task_id: str | None = None,
        attempt: int | None = None,
        limit: int | None = None,
        page: str | None = None,
    ) -> OutputPage:
        """The outputs of one attempt of a task, in the order of their appending; of all attempts, or of all tasks.

        At most `limit` (1,000) or 1 MiB. An inline value above 4 KiB comes as `omitted: true` and its `size`.
        `next_page` asks for the next page; it carries the filters, so it is sent alone, or with the same ones.
        """
        answer: OutputPage = await self._calls.call(
            "outputs.list",
            given({}, task_id=task_id, attempt=attempt, limit=limit, page=page),
            result_type=OutputPage,
            again=True,
        )
        return answer

    async def read(self, id: str, *, offset: int = 0, length: int | None = None) -> OutputSlice:
        """A slice of an output's content: the string itself, the compact JSON of another value, or the file.

        `offset` and `length` (at most 1 MiB, which is the default) are bytes, `size` and `sha256` those of the whole.
        What is UTF-8 as a whole is sliced at the boundaries of characters, at least one; everything else comes as
        base64. A file that is not what it was when it was appended is a `conflict` (`file_changed`).

        Raises:
            CallError: `conflict`, `not_found`, and what any call may raise.
        """
        answer: OutputSlice = await self._calls.call(
            "outputs.read", given({"id": id, "offset": offset}, length=length), result_type=OutputSlice, again=True
        )
        return answer


class Rpc:
    """`rpc.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def discover(self) -> dict[str, Any]:
        """The OpenRPC 1.3 document of this daemon, generated from its method table; also at `/openrpc.json`."""
        answer: dict[str, Any] = await self._calls.call("rpc.discover", None, result_type=dict[str, Any], again=True)
        return answer


class Server:
    """`server.*`."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def status(self) -> ServerStatus:
        """The daemon at a glance: version, uptime, boot id, what is open, how much waits for peers, and its storage."""
        answer: ServerStatus = await self._calls.call("server.status", None, result_type=ServerStatus, again=True)
        return answer

    async def ping(self) -> Pong:
        """The daemon's clock, in milliseconds since 1970; a sign of life, and the cheapest call there is."""
        answer: Pong = await self._calls.call("server.ping", None, result_type=Pong, again=True)
        return answer

    async def backup(self, path: str) -> BackedUp:
        """Copies all that is stored into a new file, while work goes on: what was acknowledged before is in it.

        `path` is absolute, on the daemon's machine; its folder is there, the file is not. It is for its owner alone
        (0600), and checked before it gets its name. To restore it, put it as `carserver.db` into an empty state folder;
        the tokens are not in it. One at a time.

        For the host.
        """
        answer: BackedUp = await self._calls.call("server.backup", {"path": path}, result_type=BackedUp, again=False)
        return answer

    async def prune(
        self,
        *,
        older_than_ms: int | None = None,
        max_runs: int | None = None,
        max_bytes: int | None = None,
        dry_run: bool = False,
    ) -> Pruned:
        """Deletes runs that are over, with their outputs, oldest ended first: as many as must go. Never a live run.

        `older_than_ms`: those that ended longer ago than that, and outputs without a run that are older. `max_runs`: as
        many as are more than that, live ones counted. `max_bytes`: as many as take more than that, events and inline
        outputs of runs counted. At least one of them is wanted. `dry_run` changes nothing, and answers what would go.

        For the host.
        """
        answer: Pruned = await self._calls.call(
            "server.prune",
            given({"dry_run": dry_run}, older_than_ms=older_than_ms, max_runs=max_runs, max_bytes=max_bytes),
            result_type=Pruned,
            again=False,
        )
        return answer
