"""`tools.register` and `tools.list` in the CAR dialect; all else of `tools.*` is the native one."""

from carserver.methods.toolbox import host
from carserver.protocol.cartools import CarToolList, GivenCarTool
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session

_ECHO = {"name": "echo", "description": "Says it again.", "parameters": {"type": "object"}, "returns": None}


@method(
    "tools.register",
    dialect="car",
    again=True,
    example=Example([_ECHO, {"name": "shout"}]),
)
async def register(session: Session, params: list[GivenCarTool]) -> int:
    """Hosts tools on this connection, as the native method does; the answer is their number.

    Their names may be others' as well: this connection gets its own by them, and never those of another connection of
    the dialect. So many agents that register tools of the same names, as each has a `finish`, work side by side.
    Everybody else gets, by such a name, the one that came first.

    A member that is null is as good as left out. `cache_ttl_secs`, `rate_limit` and `source` have no effect: answers
    are not kept, calls are not counted, and where a tool comes from is known.
    """
    return await host(session, params, GivenCarTool.native, for_itself=True)


@method("tools.list", dialect="car", again=True, pages=True, example=Example(before=[("tools.register", [_ECHO])]))
def list_(session: Session) -> Encoded[CarToolList]:
    """The tools that this connection may invoke, by name: its own, and those of the tools file and of native peers.

    `source` is `user_defined` where a connection hosts it, `process` where the daemon runs a command for it.
    """
    return Encoded(session.services.toolbox.car_list(session.hosting))
