"""The front end: listens, counts its connections, and flushes all that have something to send once per tick."""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from carserver.core.principals import Principal
from carserver.front.connection import Connection, State
from carserver.front.handshake import Policy
from carserver.protocol.closing import Close
from carserver.protocol.frames import notification
from carserver.protocol.server import Draining
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.session import Services, Session

log = logging.getLogger("carserver.front")


class Front:
    """All WebSocket connections of the daemon.

    Args:
        services: What sessions get.
        dispatcher: Where messages go.
        policy: Who may connect.
        page: The HTTP answer at a path of `handshake.PAGES`.
    """

    def __init__(
        self, services: Services, dispatcher: Dispatcher, policy: Policy, page: Callable[[str], bytes]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.services = services
        self.settings = services.settings
        self.dispatcher = dispatcher
        self.page = page
        self.policy = policy
        self.connections: set[Connection] = set()
        self._unauthenticated: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._dirty: list[Connection] = []
        self._server: asyncio.Server | None = None

    async def listen(self, sock: socket.socket) -> None:
        """Serves a bound socket."""
        self._server = await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=self.settings.backlog)

    # What connections tell.

    def accepted(self, connection: Connection) -> bool:
        """A socket was accepted; False: it is one too many even to be refused in words."""
        self.connections.add(connection)
        if _is_foreign(connection.address):
            self._addresses[connection.address] += 1
        # Room to tell some of those who are too many, and for the probes of /healthz.
        return len(self.connections) <= self.settings.connections + self.settings.connections_per_address

    def full(self, connection: Connection) -> str | None:
        """The limit that leaves no room for this connection to open, if one does."""
        if len(self.connections) > self.settings.connections:
            return f"connections ({self.settings.connections})"
        if self._addresses[connection.address] > self.settings.connections_per_address:
            return f"connections_per_address ({self.settings.connections_per_address})"
        return None

    def session(self, connection: Connection, principal: Principal | None) -> Session:
        """A connection was upgraded."""
        if principal is None:
            self._unauthenticated[connection] = None
            if len(self._unauthenticated) > self.settings.unauthenticated:
                oldest = next(iter(self._unauthenticated))
                del self._unauthenticated[oldest]
                limit = f"unauthenticated ({self.settings.unauthenticated})"
                oldest.drop_unauthenticated(
                    f"too many connections wait for authentication: {limit}", Close.TRY_AGAIN_LATER
                )
        client_id = self.services.daemon.new_id()
        return Session(client_id, connection.outbox, connection, self.services, principal)

    def authenticated(self, connection: Connection) -> None:
        """It has a principal now."""
        self._unauthenticated.pop(connection, None)

    def lost(self, connection: Connection) -> None:
        """Its socket is gone."""
        self.connections.discard(connection)
        self._unauthenticated.pop(connection, None)
        if connection.address in self._addresses:
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def flush_soon(self, connection: Connection) -> None:
        """It has something to send: at the end of this tick, joined with what else comes in it."""
        if not self._dirty:
            self.loop.call_soon(self._flush)
        self._dirty.append(connection)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()

    # Figures.

    @property
    def waiting_for_authentication(self) -> int:
        """Open connections without a principal."""
        return len(self._unauthenticated)

    def unsent(self) -> tuple[int, int]:
        """Bytes that wait for peers: in all, and for the slowest."""
        sizes = [connection.unsent_bytes for connection in self.connections if connection.state is not State.GONE]
        return sum(sizes), max(sizes, default=0)

    def in_flight(self) -> int:
        """Requests that were started and are not answered."""
        sessions = (connection.session for connection in self.connections)
        return sum(session.in_flight + session.waiting for session in sessions if session is not None)

    # The end.

    def stop_listening(self) -> None:
        """No new connections."""
        if self._server is not None:
            self._server.close()

    def announce_drain(self) -> None:
        """Tells every peer that the connection is about to be closed."""
        frame = notification("server.draining", Draining(retry_after_ms=self.settings.retry_after_ms))
        for connection in self.connections:
            if connection.session is not None and connection.session.principal is not None:
                connection.outbox.send(frame)

    def close_all(self) -> None:
        """Sends every peer a close frame, 1012, after what waits for it."""
        for connection in list(self.connections):
            if connection.state is State.OPENING:
                connection.abort()
            else:
                connection.end(Close.RESTARTING, "the daemon stops: reconnect")

    def abort_all(self) -> None:
        """Whoever is still there."""
        for connection in list(self.connections):
            connection.abort()


def _is_foreign(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return not (mapped or found).is_loopback
