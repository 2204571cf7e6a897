"""The records of a live trace, for a type checker: which members each kind has (contract, section 7).

They are the dicts that came. Nothing is checked as they come: what a later daemon adds is there, too.
"""

from typing import Any, Literal, NotRequired, TypedDict


class Started(TypedDict):
    """The first record of a trace from the beginning."""

    record: Literal["started"]
    run_id: str
    agent_id: str
    intent: str
    outcome_description: NotRequired[str]
    started_at: str


class Event(TypedDict):
    """An entry of the log that was recorded as an event."""

    record: Literal["event"]
    sequence: int
    timestamp_ms: int
    event: dict[str, Any]


class Turn(TypedDict):
    """An entry that an agent of the CAR dialect recorded: what it did, and what came of it.

    `index` is the entry's sequence; the members are as they were recorded.
    """

    record: Literal["turn"]
    index: int
    prompt: NotRequired[Any]
    tool: NotRequired[Any]
    parameters: NotRequired[Any]
    output: NotRequired[Any]
    cli_outcome: NotRequired[Any]
    verifier_verdict: NotRequired[Any]
    policy_rejected: NotRequired[Any]


class ModelTurn(TypedDict):
    """Likewise, what a model wrote and the tools that it asked for.

    `recorded_at` is when the daemon had it (RFC 3339).
    """

    record: Literal["model_turn"]
    index: int
    recorded_at: str
    turn_index: NotRequired[Any]
    assistant_text: NotRequired[Any]
    requested_tool_calls: NotRequired[Any]
    model_id: NotRequired[Any]
    token_usage: NotRequired[Any]
    duration_ms: NotRequired[Any]


class Termination(TypedDict):
    """How a run ended in its agent's own words: status, summary, evidence, metrics."""

    kind: Literal["outcome"]
    outcome: dict[str, Any]


class Ended(TypedDict):
    """The state of a run that is over; `termination` where an agent of the CAR dialect completed it."""

    record: Literal["ended"]
    run_id: str
    run_status: str
    result_text: NotRequired[str]
    error: NotRequired[str]
    termination: NotRequired[Termination]
    ended_at: str


Record = Started | Event | Turn | ModelTurn | Ended
