"""What the agent loop of the CAR client calls besides runs, tools and proposals, as an embedder would serve it:

`serve --methods tests.car_methods`. Its model looks up what it is asked for, and finishes with what it was told.
"""

import itertools
from typing import Any

from msgspec import Struct

from carserver.rpc.method import method
from carserver.rpc.session import Session

TRACES = itertools.count(1)


class Usage(Struct, frozen=True, kw_only=True):
    """How many tokens a turn of the model took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ToolCall(Struct, frozen=True, kw_only=True):
    """What the model wants to have called."""

    id: str
    name: str
    arguments: dict[str, Any]


class Message(Struct, frozen=True, kw_only=True):
    """One of a conversation; its `role` is `system`, `user`, `assistant` or `tool_result`."""

    role: str
    content: str


class Infer(Struct, frozen=True, kw_only=True):
    """Params of `infer`, as far as they matter here."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    model: str | None = None
    params: dict[str, Any]


class Inferred(Struct, frozen=True, kw_only=True):
    """What the model says, and wants to have called."""

    text: str = ""
    tool_calls: list[ToolCall]
    model_used: str
    latency_ms: int = 5
    usage: Usage
    trace_id: str


class Verify(Struct, frozen=True):
    """Params of `verify`."""

    proposal: dict[str, Any]


class Verified(Struct, frozen=True):
    """Result of `verify`."""

    valid: bool
    issues: list[str]


class Policy(Struct, frozen=True):
    """Params of `policy.register`."""

    name: str
    rule: str
    target: str | None = None
    key: str | None = None
    pattern: str | None = None


class Done(Struct, frozen=True):
    """It is done; `count` is of how many there are now."""

    count: int
    ok: bool = True


_policies: dict[str, Policy] = {}


@method("infer")
def infer(session: Session, params: Infer) -> Inferred:
    """Calls `lookup` with what the user said, and then `finish` with what that has found."""
    last = params.messages[-1]
    number = len(params.messages)
    if last.role == "tool_result":
        call = ToolCall(id=f"call_{number}", name="finish", arguments={"answer": f"it is {last.content}"})
    else:
        call = ToolCall(id=f"call_{number}", name="lookup", arguments={"key": last.content})
    return Inferred(
        tool_calls=[call],
        model_used=params.model or "scripted",
        usage=Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15),
        trace_id=f"trace-{next(TRACES)}",
    )


@method("verify")
def verify(session: Session, params: Verify) -> Verified:
    """Finds fault with proposals that do nothing, and with what a policy denies."""
    actions = params.proposal.get("actions") or []
    denied = {policy.target for policy in _policies.values() if policy.rule == "deny_tool"}
    issues = [f"tool {action['tool']!r} is denied" for action in actions if action["tool"] in denied]
    if not actions:
        issues.append("it does nothing")
    return Verified(valid=not issues, issues=issues)


@method("policy.register")
def register_policy(session: Session, params: Policy) -> Done:
    """Keeps a policy, for everybody."""
    _policies[params.name] = params
    return Done(len(_policies))


@method("agents.register_basics")
def register_basics(session: Session) -> Done:
    """There are none."""
    return Done(0)


@method("agents.remove", role="host")
def remove_agent(session: Session) -> str:
    """Removes nothing, for the host alone; the answer is who asked for it."""
    return session.acting.name
