"""`server.handshake`, with which the CAR dialect begins; `server.schema` and `capabilities.list`, which describe it."""

from collections.abc import Sequence

from carserver import __version__
from carserver.protocol.codec import check_name
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.handshake import (
    CAPABILITIES,
    VERSIONS,
    Capability,
    CapabilityList,
    Handshake,
    Negotiated,
    ServerSchema,
)
from carserver.rpc.method import Example, method
from carserver.rpc.session import Session

_HANDSHAKE = {"protocol_version": 3, "client_version": "0.58.0", "required_capabilities": ["runs.cancel.v1"]}


@method(
    "server.handshake",
    again=True,
    errors=[ErrorKind.VERSION_MISMATCH, ErrorKind.CAPABILITY_MISSING],
    example=Example(_HANDSHAKE),
)
def handshake(session: Session, params: Handshake) -> Negotiated:
    """From its answer on the connection speaks the CAR dialect: its methods have the forms that the CAR client knows.

    Versions 1, 2 and 3 of that protocol are served, and the client's own is the answer; another is a
    `version_mismatch`, with those that are (`supported`). A required capability that there is not is a
    `capability_missing`, with what is `missing` and what is `available`; an optional one is left out of the answer.
    Refused, the connection stays as it was.
    """
    required = _names(session, params.required_capabilities, "required_capabilities")
    optional = _names(session, params.optional_capabilities, "optional_capabilities")
    if params.protocol_version not in VERSIONS:
        served = ", ".join(map(str, VERSIONS))
        raise RpcError(
            ErrorKind.VERSION_MISMATCH,
            f"protocol_version: {params.protocol_version} is not served; these are: {served}",
            given=params.protocol_version,
            supported=VERSIONS,
        )
    if missing := [name for name in required if name not in CAPABILITIES]:
        raise RpcError(
            ErrorKind.CAPABILITY_MISSING,
            f"required_capabilities: there is no {missing[0]!r}; there are: {', '.join(CAPABILITIES)}",
            missing=missing,
            available=CAPABILITIES,
        )
    session.dialect = "car"
    return Negotiated(
        protocol_version=params.protocol_version,
        server_version=__version__,
        client_protocol_version=params.protocol_version,
        client_version=params.client_version,
        negotiated_capabilities=[name for name in dict.fromkeys((*required, *optional)) if name in CAPABILITIES],
    )


def _names(session: Session, given: Sequence[str] | None, at: str) -> Sequence[str]:
    for place, name in enumerate(given or ()):
        check_name(name, session.services.settings.name_chars, f"{at}[{place}]")
    return given or ()


@method("server.schema", dialect="car", again=True, pages=True, example=Example())
def schema(session: Session) -> ServerSchema:
    """The methods of the CAR dialect, as in the OpenRPC document (`x-car`), with the types that they refer to.

    `digest` is the SHA-256 of `schema` by its very bytes in the answer; the version is not in it.
    """
    return session.services.daemon.car_schema


@method("capabilities.list", dialect="car", again=True, pages=True, example=Example())
def capabilities(session: Session) -> CapabilityList:
    """Every method that this connection may call, by name."""
    role = session.acting.role
    spoken = session.services.daemon.table.spoken(session.dialect)
    allowed = [
        Capability(method=name, role=entry.role)
        for name, entry in sorted(spoken.items())
        if entry.role != "host" or role == "host"
    ]
    return CapabilityList(caller_role=role, count=len(allowed), methods=allowed)
