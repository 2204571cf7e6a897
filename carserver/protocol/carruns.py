"""Runs as the CAR dialect has them: params and results of its `runs.*` (contract, section 10)."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.runs import Cursor, Id, LiveStatus, Name


class StartRun(Struct, frozen=True, kw_only=True):
    """Params of `runs.start`. Whose run it is called: `agent_id`, else the connection's agent, else `agent_name`."""

    intent: str
    agent_id: Id | None = None
    agent_name: Id | None = None
    outcome_description: str | None = None
    idempotency_key: Name | None = None


class Started(Struct, frozen=True, kw_only=True):
    """The run, and the name that its agent has."""

    run_id: str
    agent_id: str


class RecordTurns(Struct, frozen=True, kw_only=True):
    """Params of `runs.record_turns`.

    A turn is an object: prompt, tool, parameters, output, cli_outcome, verifier_verdict, policy_rejected, and more.
    """

    run_id: Id
    turns: Annotated[list[Raw], msgspec.Meta(min_length=1)]


class RecordModelTurn(Struct, frozen=True, kw_only=True):
    """Params of `runs.record_model_turn`. `requested_tool_calls` are objects of id, name, arguments."""

    run_id: Id
    turn_index: Raw | UnsetType = UNSET
    assistant_text: Raw | UnsetType = UNSET
    requested_tool_calls: Raw | UnsetType = UNSET
    model_id: Raw | UnsetType = UNSET
    token_usage: Raw | UnsetType = UNSET
    duration_ms: Raw | UnsetType = UNSET


Dropped = Literal["run_not_found", "run_terminal", "run_turn_limit", "turn_too_large"]


class TurnsRecorded(Struct, frozen=True, kw_only=True):
    """The sequence of the first turn and their number; or why nothing was recorded: then both are 0."""

    run_id: str
    base_index: int
    count: int
    ok: bool
    dropped: Dropped | UnsetType = UNSET


OutcomeStatus = Literal["success", "partial_success", "done", "give_up", "timeout", "failure"]
COMPLETES: frozenset[OutcomeStatus] = frozenset({"success", "partial_success", "done"})
"""The outcomes that complete a run; the others fail it."""


class Outcome(Struct, frozen=True, kw_only=True):
    """What of an outcome the daemon reads; all of it is kept, and comes back as it was."""

    status: OutcomeStatus
    summary: str | None = None


class CompleteRun(Struct, frozen=True, kw_only=True):
    """Params of `runs.complete`; the outcome has a status, and may have summary, evidence, metrics and more."""

    run_id: Id
    outcome: Raw


class Completed(Struct, frozen=True, kw_only=True):
    """The run is over."""

    run_id: str
    ok: Literal[True] = True


class FollowedRun(Struct, frozen=True, kw_only=True):
    """The beginning of the log as records; `cursor` is its length, and the stream begins there."""

    run_id: str
    agent_id: str
    turns_so_far: list[Raw]
    cursor: int
    status: LiveStatus


class ListAgentRuns(Struct, frozen=True, kw_only=True):
    """Params of the dialect's `runs.list`."""

    agent_id: Id


class AgentRun(Struct, frozen=True, kw_only=True):
    """One run of an agent; times are RFC 3339."""

    run_id: str
    agent_id: str
    intent: str
    started_at: str
    ended_at: str | UnsetType = UNSET
    status: LiveStatus
    turn_count: int


class AgentRuns(Struct, frozen=True, kw_only=True):
    """The runs of an agent, newest first; `has_more` where these are not all."""

    agent_id: str
    runs: list[AgentRun]
    has_more: Literal[True] | UnsetType = UNSET


class GetTrace(Struct, frozen=True, kw_only=True):
    """Params of `runs.get_trace`."""

    run_id: Id
    cursor: Cursor = 0


class RunTrace(Struct, frozen=True, kw_only=True):
    """A run's records from the cursor on, and the cursor after them; `has_more` where the log goes on there."""

    run_id: str
    agent_id: str
    records: list[Raw]
    cursor: int
    has_more: Literal[True] | UnsetType = UNSET


class NoTrace(Struct, frozen=True, kw_only=True):
    """There is no such run."""

    run_id: str
    not_found: Literal[True] = True


class CancelByKey(Struct, frozen=True, kw_only=True):
    """Params of the dialect's `runs.cancel`."""

    run_id: Id
    idempotency_key: Name
    reason: str


ReceiptStatus = Literal["cancelled_confirmed", "already_terminal", "termination_unconfirmed"]


class Receipt(Struct, frozen=True, kw_only=True):
    """That a run was cancelled, or over already, and by whom. Digests are sha256, hex.

    `reason_digest` is of the reason's UTF-8, `terminal_digest` of the bytes of the run's `ended` record,
    `receipt_digest` of the canonical JSON (RFC 8785) of the members before it.
    """

    receipt_version: Literal[1]
    run_id: str
    idempotency_key: str
    reason_digest: str
    principal: str
    status: ReceiptStatus
    terminal_digest: str
    action_id: None
    request_id: None
    receipt_digest: str


class Resumed(Struct, frozen=True, kw_only=True):
    """The run goes on with this connection; `resumed_from_client_id` attended it last, as far as that is known."""

    run_id: str
    agent_id: str
    client_id: str
    resumed_from_client_id: str | None
