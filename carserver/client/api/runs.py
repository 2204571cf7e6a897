"""`runs.*` of the daemon, typed: see the package.

*Generated from the daemon's method table by `scripts/docs`; do not edit.*
"""

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from carserver.client.calls import Calls, given
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
from carserver.protocol.transfer import Imported


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
