"""Tools in the CAR dialect: what a definition may have there, and how it is listed (contract, section 10)."""

from typing import Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.protocol.tools import GivenTool, ToolName


class GivenCarTool(Struct, frozen=True, kw_only=True):
    """A tool that a session hosts: a `ToolSchema`, of which null is as good as nothing."""

    name: ToolName
    description: str | None = None
    parameters: Raw | UnsetType = UNSET
    returns: Raw | UnsetType = UNSET
    idempotent: bool | None = None

    def native(self) -> GivenTool:
        """The same, as it is given natively."""
        return GivenTool(
            name=self.name,
            description=self.description or "",
            parameters=_given(self.parameters),
            returns=_given(self.returns),
            idempotent=bool(self.idempotent),
        )


def _given(schema: Raw | UnsetType) -> Raw | UnsetType:
    return UNSET if schema is UNSET or bytes(schema) == b"null" else schema


class CarTool(Struct, frozen=True, kw_only=True):
    """A tool as it is listed; `source` is `user_defined` (a session hosts it) or `process` (the tools file has it)."""

    name: str
    source: Literal["user_defined", "process"]
    description: str
    parameters: Raw
    returns: Raw | UnsetType = UNSET
    idempotent: bool


class CarToolList(Struct, frozen=True, kw_only=True):
    """All tools, by name."""

    tools: list[CarTool]
    count: int
