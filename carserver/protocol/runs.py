"""Runs on the wire: the snapshot, and the params and results of `runs.*` (contract, section 7)."""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType


class Status(StrEnum):
    """A run's status. The order is the storage's: a status is kept as its place here, so new ones go to the end."""

    CREATED = "created"
    PLANNING = "planning"
    EXECUTING = "executing"
    VERIFYING = "verifying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


STATUSES = tuple(Status)
LIVE = frozenset({Status.CREATED, Status.PLANNING, Status.EXECUTING, Status.VERIFYING})
FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

RECORDS = ("event", "turn", "model_turn")
"""How the live trace has an entry of the log. The order is the storage's, as that of the statuses is.

A turn is written by the methods of the CAR dialect (contract, section 10), as an event of the type of its record.
"""

LiveStatus = Literal["in_progress", "completed", "incomplete"]
IS_NAME = {"carserver": "name"}
"""Marks a type of params whose values are names: printable characters, at most the setting `name_chars` (256)."""

Id = Annotated[str, msgspec.Meta(extra=IS_NAME)]
Name = Annotated[str, msgspec.Meta(min_length=1, extra=IS_NAME)]
Cursor = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Snapshot(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run's state at one cursor (its `event_count`). Times are milliseconds since 1970."""

    id: str
    session_id: str
    agent_id: str
    status: Status
    prompt: str
    created_at_ms: int
    updated_at_ms: int
    result_text: str | None = None
    error: str | None = None
    cancel_reason: str | None = None
    interrupted_reason: str | None = None
    event_count: int
    parent_run_id: str | None = None
    metadata: Raw | UnsetType = UNSET  # not `| None`: msgspec takes that for null alone
    ended_at_ms: int | None = None
    outcome_description: str | None = None
    epoch: str


class CreateRun(Struct, frozen=True, kw_only=True):
    """Params of `runs.create`."""

    prompt: str
    session_id: Id = ""
    agent_id: Id | None = None
    parent_run_id: Name | None = None
    outcome_description: str | None = None
    metadata: Raw | UnsetType = UNSET
    idempotency_key: Name | None = None


class RecordEvents(Struct, frozen=True, kw_only=True):
    """Params of `runs.record`."""

    run_id: Id
    events: Annotated[list[Raw], msgspec.Meta(min_length=1)]
    at_ms: list[Milliseconds] | None = None
    expected_sequence: Cursor | None = None
    batch_id: Name | None = None


class Recorded(Struct, frozen=True, kw_only=True):
    """What `runs.record` stored; `status` is the run's after that batch."""

    run_id: str
    first_sequence: int
    count: int
    cursor: int
    status: Status


class RunRef(Struct, frozen=True, kw_only=True):
    """Params of the methods that name a run and no more."""

    run_id: Id


class ReadEvents(Struct, frozen=True, kw_only=True):
    """Params of `runs.events`."""

    run_id: Id
    after: Cursor = 0
    limit: Limit | None = None
    types: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None


class EventEntry(Struct, frozen=True, kw_only=True):
    """One entry of a run's log."""

    sequence: int
    timestamp_ms: int
    event: Raw


class EventPage(Struct, frozen=True, kw_only=True):
    """A page of the log; `cursor` is past the last entry looked at."""

    events: list[EventEntry]
    cursor: int
    has_more: bool
    epoch: str


class RunFilters(Struct, frozen=True, kw_only=True):
    """Which runs are meant: those of which all that is given is true. Params of `runs.watch`."""

    session_id: Id | None = None
    agent_id: Id | None = None
    status: Status | None = None
    parent_run_id: Id | None = None
    created_after_ms: Milliseconds | None = None
    created_before_ms: Milliseconds | None = None


class ListRuns(RunFilters, frozen=True, kw_only=True):
    """Params of `runs.list`: the filters, and the place to go on from."""

    limit: Limit | None = None
    page: str | None = None


class RunPage(Struct, frozen=True, kw_only=True):
    """A page of runs, newest first; `next_page` is null on the last."""

    runs: list[Snapshot]
    next_page: str | None


class FailRun(Struct, frozen=True, kw_only=True):
    """Params of `runs.fail`."""

    run_id: Id
    error: str


class CancelRun(Struct, frozen=True, kw_only=True):
    """Params of `runs.cancel`."""

    run_id: Id
    reason: str = "cancelled by host"


class Cancelled(Struct, frozen=True, kw_only=True):
    """Whether this call ended the run, and the status that it has now."""

    cancelled: bool
    status: Status


class Deleted(Struct, frozen=True, kw_only=True):
    """The run is no more."""

    deleted: bool


class SubscribeTrace(Struct, frozen=True, kw_only=True):
    """Params of `runs.trace.subscribe`."""

    run_id: Id
    cursor: Cursor = 0
    epoch: str | None = None


class Termination(Struct, frozen=True, kw_only=True):
    """How a run ended in its agent's own words, where it was completed with an outcome (`runs.complete`)."""

    kind: Literal["outcome"] = "outcome"
    outcome: Raw


class Subscribed(Struct, frozen=True, kw_only=True):
    """Where the stream begins, and whether it goes on from the subscription that the caller named.

    `termination` is that of the record `ended`: a run's snapshot does not have it.
    """

    run: Snapshot
    cursor: int
    epoch: str
    recovered: bool
    termination: Termination | UnsetType = UNSET


class Unsubscribed(Struct, frozen=True, kw_only=True):
    """Whether there was a subscription."""

    run_id: str
    removed: bool


class StartedRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="started"):
    """The first record of a stream that begins at 0."""

    run_id: str
    agent_id: str
    intent: str
    outcome_description: str | None = None
    started_at: str


class EndedRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="ended"):
    """The state of a run that is over; it does not advance the cursor."""

    run_id: str
    run_status: Status
    result_text: str | None = None
    error: str | None = None
    termination: Termination | UnsetType = UNSET
    ended_at: str


class EventRecord(Struct, frozen=True, kw_only=True, tag_field="record", tag="event"):
    """One entry of the log."""

    sequence: int
    timestamp_ms: int
    event: Raw


class TurnRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="turn"):
    """A turn of an agent, as it was recorded; `index` is its sequence. What else it was given stands here, too."""

    index: int
    prompt: Raw | UnsetType = UNSET
    tool: Raw | UnsetType = UNSET
    parameters: Raw | UnsetType = UNSET
    output: Raw | UnsetType = UNSET
    cli_outcome: Raw | UnsetType = UNSET
    verifier_verdict: Raw | UnsetType = UNSET
    policy_rejected: Raw | UnsetType = UNSET


class ModelTurnRecord(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="model_turn"):
    """A model's turn, as it was recorded; `index` is its sequence, `recorded_at` when the daemon had it."""

    index: int
    recorded_at: str
    turn_index: Raw | UnsetType = UNSET
    assistant_text: Raw | UnsetType = UNSET
    requested_tool_calls: Raw | UnsetType = UNSET
    model_id: Raw | UnsetType = UNSET
    token_usage: Raw | UnsetType = UNSET
    duration_ms: Raw | UnsetType = UNSET


class TraceEvent(Struct, frozen=True, kw_only=True):
    """Params of the notification `runs.trace.event`."""

    run_id: str
    agent_id: str
    record: StartedRecord | EventRecord | TurnRecord | ModelTurnRecord | EndedRecord
    cursor: int
    status: LiveStatus
    run_status: Status


class TraceClosed(Struct, frozen=True, kw_only=True):
    """Params of the notification `runs.trace.closed`: nothing more follows for this run on this connection."""

    run_id: str
    reason: str


class RunCancelled(Struct, frozen=True, kw_only=True):
    """Params of the notification `runs.cancelled`, sent to the connections that attend the run."""

    run_id: str
    reason: str


class Watching(Struct, frozen=True, kw_only=True):
    """The connection watches from now on."""

    watching: bool = True


class Unwatched(Struct, frozen=True, kw_only=True):
    """Whether it watched until now."""

    watching: bool = False
    removed: bool


class RunChanged(Struct, frozen=True, kw_only=True):
    """Params of the notification `runs.changed`, sent to who watches: the run as it is by now."""

    run: Snapshot


class WatchReset(Struct, frozen=True, kw_only=True):
    """Params of the notification `runs.watch.reset`: changes were not told, so list again. `reason` is for a person."""

    reason: str
