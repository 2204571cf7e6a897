"""`tools.register`, `tools.unregister`, `tools.list`: what tools there are (contract, section 6)."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from carserver.config import KIB
from carserver.core.toolbox import Definition
from carserver.protocol.errors import ErrorKind, limit_exceeded
from carserver.protocol.tools import GivenTool, ToolList, ToolRef, Unregistered
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

T = TypeVar("T")
_AT_ONCE_BYTES = 64 * KIB  # of definitions that are checked before others have their turn: the worst takes 0.1 s

_GREP = {
    "name": "grep",
    "description": "Searches the working tree for a regular expression.",
    "parameters": {
        "type": "object",
        "properties": {"pattern": {"type": "string"}, "paths": {"type": "array", "items": {"type": "string"}}},
        "required": ["pattern"],
    },
    "idempotent": True,
}


@method("tools.register", again=True, errors=[ErrorKind.CONFLICT], example=Example([_GREP]))
async def register(session: Session, params: list[GivenTool]) -> int:
    """Hosts tools on this connection, all of the array or none; the answer is their number.

    Whoever invokes one of them, this connection is sent the request `tools.execute`. One's own tool of the same name is
    replaced; a name of another live connection, or of the tools file, is a `conflict` (`name_taken`). They are hosted
    until they are unregistered or the connection ends.

    `parameters` and `returns` are JSON Schemas, of drafts 4 to 2020-12 (`$schema`; else the latest); `format` is not
    checked. What a schema refers to stands in it (`#/$defs/path`), and its patterns have no look-around and no
    back-references: they are matched in linear time.
    """
    return await host(session, params, lambda tool: tool)


async def host(
    session: Session, given: Sequence[T], native: Callable[[T], GivenTool], *, for_itself: bool = False
) -> int:
    """Hosts tools on a connection, all or none; their number.

    `native` makes of what was given what is checked. `for_itself`: others may have tools of the same names.

    Raises:
        RpcError: invalid_params, conflict, limit_exceeded.
    """
    toolbox, settings = session.services.toolbox, session.services.settings
    if len(given) > settings.hosted_tools:
        raise limit_exceeded("hosted_tools", len(given), settings.hosted_tools)
    definitions: list[Definition] = []
    at_once = 0
    for place, tool in enumerate(given):
        definitions.append(toolbox.define(native(tool), place))
        at_once += len(definitions[-1].listed)
        if at_once > _AT_ONCE_BYTES:
            at_once = 0
            await session.services.daemon.sleep(0)
    return toolbox.register(session.host_tools(), definitions, for_itself=for_itself)


@method("tools.unregister", again=True, example=Example({"name": "grep"}, before=[("tools.register", [_GREP])]))
def unregister(session: Session, params: ToolRef) -> Unregistered:
    """Hosts a tool no longer: one's own, of this connection. What was invoked goes on."""
    removed = session.services.toolbox.unregister(session.hosting, params.name)
    return Unregistered(unregistered=params.name, removed=removed)


@method("tools.list", again=True, pages=True, example=Example(before=[("tools.register", [_GREP])]))
def list_(session: Session) -> Encoded[ToolList]:
    """All tools that may be invoked now, by name.

    `source` is `client` where a connection hosts it, `process` where the daemon runs a command for it.
    """
    return Encoded(session.services.toolbox.list())
