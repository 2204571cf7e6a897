"""The front end: listens, counts its connections, and flushes all that have something to send once per tick.

Connections are of any kind: WebSockets, and what speaks in lines over a Unix socket or the standard streams.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from carserver.core.principals import Principal
from carserver.front.connection import Connection
from carserver.front.handshake import Policy
from carserver.front.stdio import Stdio
from carserver.front.stream import State, Stream
from carserver.front.unix import UnixConnection, UnixSocket
from carserver.protocol.closing import Close
from carserver.protocol.frames import notification
from carserver.protocol.server import Draining
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.session import Services, Session

log = logging.getLogger("carserver.front")


class Entrances(NamedTuple):
    """Where peers come in: a socket that listens, and what was asked for beside it."""

    tcp: socket.socket
    unix: UnixSocket | None = None
    stdio: Stdio | None = None


class Front:
    """All connections of the daemon.

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
        self.connections: set[Stream] = set()
        self._unauthenticated: dict[Stream, None] = {}
        self._addresses: Counter[str] = Counter()
        self._dirty: list[Stream] = []
        self._servers: list[asyncio.Server] = []
        self._unix: UnixSocket | None = None
        self._stdio: Stdio | None = None

    async def listen(self, entrances: Entrances, parent_has_ended: Callable[[], None]) -> None:
        """Serves whoever comes in; with `--stdio`, tells when the parent process has no more to say or is gone."""
        backlog, self._unix, self._stdio = self.settings.backlog, entrances.unix, entrances.stdio
        self._servers = [await self.loop.create_server(lambda: Connection(self), sock=entrances.tcp, backlog=backlog)]
        if self._unix is not None:
            sock = self._unix.sock
            server = await self.loop.create_unix_server(lambda: UnixConnection(self), sock=sock, backlog=backlog)
            self._servers.append(server)
            log.info("listening on the Unix socket %s", self._unix.path)
        if self._stdio is not None:
            await self._stdio.connect(self, parent_has_ended)

    # What connections tell.

    def accepted(self, connection: Stream) -> bool:
        """A socket was accepted; False: it is one too many even to be refused in words."""
        self.connections.add(connection)
        if _is_foreign(connection.address):
            self._addresses[connection.address] += 1
        # Room to tell some of those who are too many, and for the probes of /healthz.
        return len(self.connections) <= self.settings.connections + self.settings.connections_per_address

    def full(self, connection: Stream) -> str | None:
        """The limit that leaves no room for this connection to open, if one does."""
        if len(self.connections) > self.settings.connections:
            return f"connections ({self.settings.connections})"
        if self._addresses[connection.address] > self.settings.connections_per_address:
            return f"connections_per_address ({self.settings.connections_per_address})"
        return None

    def session(self, connection: Stream, principal: Principal | None, *, provisional: bool = False) -> Session:
        """A connection is open."""
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
        return Session(client_id, connection.outbox, connection, self.services, principal, provisional=provisional)

    def authenticated(self, connection: Stream) -> None:
        """It has a principal now."""
        self._unauthenticated.pop(connection, None)

    def lost(self, connection: Stream) -> None:
        """Its socket is gone."""
        self.connections.discard(connection)
        self._unauthenticated.pop(connection, None)
        if connection.address in self._addresses:
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def flush_soon(self, connection: Stream) -> None:
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

    def asked_of_hosts(self) -> int:
        """Requests to peers that host tools which are not answered."""
        sessions = (connection.session for connection in self.connections)
        return sum(session.hosting.asked for session in sessions if session is not None and session.hosting is not None)

    # The end.

    def stop_listening(self) -> None:
        """No new connections."""
        if self._unix is not None:
            self._unix.remove()
        for server in self._servers:
            server.close()

    def announce_drain(self) -> None:
        """Tells every peer that the connection is about to be closed."""
        frame = notification("server.draining", Draining(retry_after_ms=self.settings.retry_after_ms))
        for connection in self.connections:
            if connection.session is not None and connection.session.principal is not None:
                connection.outbox.send(frame)

    def close_all(self) -> None:
        """Tells every peer, after what waits for it, that the connection ends: 1012."""
        for connection in list(self.connections):
            if connection.state is State.OPENING:
                connection.abort()
            else:
                connection.end(Close.RESTARTING, "the daemon stops: reconnect")

    @property
    def all_gone(self) -> bool:
        """Whether nobody is connected, and standard output has taken what was for it."""
        return not self.connections and not (self._stdio is not None and self._stdio.writing)

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
