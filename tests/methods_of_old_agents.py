"""What the CAR client calls besides runs, tools and proposals, as somebody's own module would serve it:

`serve --methods tests.methods_of_old_agents`.
"""

from typing import Any

from msgspec import Struct

from carserver.rpc.method import method
from carserver.rpc.session import Session


class Policy(Struct, frozen=True):
    """Params of `policy.register`."""

    name: str
    rule: str
    target: str | None = None
    key: str | None = None
    pattern: str | None = None


class Verify(Struct, frozen=True):
    """Params of `verify`."""

    proposal: dict[str, Any]


class Verified(Struct, frozen=True):
    """Result of `verify`."""

    valid: bool
    issues: list[str]


@method("agents.register_basics")
def register_basics(session: Session) -> None:
    """There are none."""


@method("policy.register")
def register_policy(session: Session, params: Policy) -> str:
    """Holds nobody to it."""
    return f"{params.rule} {params.target}"


@method("verify")
def verify(session: Session, params: Verify) -> Verified:
    """Finds fault with proposals that do nothing."""
    issues = [] if params.proposal.get("actions") else ["it does nothing"]
    return Verified(valid=not issues, issues=issues)
