"""`rpc.discover` and `server.*`: the daemon about itself (contract, section 9)."""

from typing import Any

from carserver.protocol.server import Pong, ServerStatus
from carserver.rpc.method import Encoded, Example, method
from carserver.rpc.session import Session


@method("rpc.discover", while_draining=True, example=Example())
def discover(session: Session) -> Encoded[dict[str, Any]]:
    """The OpenRPC 1.3 document of this daemon, generated from its method table; also at `/openrpc.json`."""
    return Encoded(session.services.daemon.discover())


@method("server.status", while_draining=True, example=Example())
def status(session: Session) -> ServerStatus:
    """The daemon at a glance: version, uptime, boot id, what is open, how much waits for peers, and its storage."""
    return session.services.daemon.status()


@method("server.ping", while_draining=True, example=Example())
def ping(session: Session) -> Pong:
    """The daemon's clock, in milliseconds since 1970; a sign of life, and the cheapest call there is."""
    return Pong(now_ms=session.services.clock.now_ms())
