"""Proposals on the wire: actions, what each depends on, and what became of them (contract, section 10).

The client leaves out what it has no value for, or says null. What is not declared here is ignored, but for members that
would change what a proposal means: those are declared, so that they can be refused by name.
"""

from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.tools import TimeoutMs

MaxRetries = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class ActionType(StrEnum):
    """What an action is; `tool_call` alone is served."""

    TOOL_CALL = "tool_call"
    STATE_WRITE = "state_write"
    STATE_READ = "state_read"
    ASSERTION = "assertion"


class FailureBehavior(StrEnum):
    """What follows when an action fails: the proposal ends; it is tried again, and then ends; it is left out."""

    ABORT = "abort"
    RETRY = "retry"
    SKIP = "skip"


class InvocationMode(StrEnum):
    """Whether an action is over when its tool has ended, or, for the other two, as soon as that has started."""

    ONE_SHOT = "one_shot"
    STREAMING = "streaming"
    LONG_RUNNING = "long_running"


class ActionStatus(StrEnum):
    """What became of an action."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"


class GivenAction(Struct, frozen=True, kw_only=True):
    """One action. `dependencies` are ids of others of the proposal; `max_retries` is 3 where it is not said."""

    type: ActionType
    id: str | None = None
    tool: str | None = None
    parameters: Raw | UnsetType = UNSET
    dependencies: list[str] | None = None
    timeout_ms: TimeoutMs | None = None
    max_retries: MaxRetries | None = None
    failure_behavior: FailureBehavior | None = None
    invocation_mode: InvocationMode | None = None
    preconditions: list[Any] | None = None
    state_dependencies: list[Any] | None = None


class GivenProposal(Struct, frozen=True, kw_only=True):
    """A graph of actions."""

    actions: list[GivenAction]
    id: str | None = None


class SubmitProposal(Struct, frozen=True, kw_only=True):
    """Params of `proposal.submit`."""

    proposal: GivenProposal


class NoStateChanges(Struct, frozen=True):
    """No state is kept, so none is changed."""


class ActionResult(Struct, frozen=True, kw_only=True):
    """What became of an action, how long it took, all tries together, and when that was.

    `not_recorded` says why the run that it is part of has no turn of it, where that is so.
    """

    action_id: str
    status: ActionStatus
    output: Raw | UnsetType = UNSET
    error: str | UnsetType = UNSET
    not_recorded: str | UnsetType = UNSET
    state_changes: NoStateChanges = NoStateChanges()
    duration_ms: int
    timestamp: str


class Cost(Struct, frozen=True, kw_only=True):
    """What a proposal took. Each action counts once: as executed, as refused before it ran, or as not attempted."""

    tool_calls: int
    actions_executed: int
    actions_rejected: int
    actions_skipped: int
    total_duration_ms: int
    retries: int


class ProposalResult(Struct, frozen=True, kw_only=True):
    """A result for each action, in the order in which these were given."""

    proposal_id: str
    results: list[ActionResult]
    cost: Cost
