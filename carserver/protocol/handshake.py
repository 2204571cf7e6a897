"""How the CAR dialect begins: `server.handshake`, `server.schema`, `capabilities.list` (contract, section 10)."""

from typing import Annotated, Literal

import msgspec
from msgspec import Raw, Struct

from carserver.protocol.runs import Id, Name
from carserver.protocol.server import Role

VERSIONS = (1, 2, 3)
"""Of the CAR protocol, that are served: 0.31.0 speaks 1, 0.58.0 speaks 3, and neither takes another."""
CAPABILITIES = ("runs.cancel.v1", "runs.resume.v1")
"""Of the CAR protocol, that there are."""

Capabilities = Annotated[list[Name], msgspec.Meta(max_length=64)]


class Handshake(Struct, frozen=True, kw_only=True):
    """Params of `server.handshake`: the version that the client speaks, and what it must and would like to have."""

    protocol_version: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    client_version: Id | None = None
    required_capabilities: Capabilities | None = None
    optional_capabilities: Capabilities | None = None


class Negotiated(Struct, frozen=True, kw_only=True):
    """The answer: the client's own version, twice, and which of the capabilities that it named there are."""

    protocol_version: int
    server_version: str
    client_protocol_version: int
    client_version: str | None
    negotiated_capabilities: list[str]


class ServerSchema(Struct, frozen=True, kw_only=True):
    """The dialect's methods and their types; `digest` is that of the bytes of `schema`, as they stand here."""

    schema: Raw
    digest: str
    digest_algorithm: Literal["sha256"] = "sha256"
    car_version: str


class Capability(Struct, frozen=True, kw_only=True):
    """A method that may be called, and by whom."""

    method: str
    role: Literal["anyone", "authenticated", "host"]


class CapabilityList(Struct, frozen=True, kw_only=True):
    """All methods that this connection may call, by name."""

    caller_role: Role
    count: int
    methods: list[Capability]
