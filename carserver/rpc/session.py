"""A session: what the daemon knows of one peer while its connection lives. No transport is named here."""

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from msgspec import Struct

from carserver.config import Settings
from carserver.core.approvals import Approvals
from carserver.core.counters import Counters
from carserver.core.handlestore import HandleStore
from carserver.core.hostboard import GONE as SESSION_GONE
from carserver.core.hostboard import Board, Follower, Seat
from carserver.core.hosting import GONE, Hosting
from carserver.core.outbox import Outbox
from carserver.core.outputstore import OutputStore
from carserver.core.principals import Principal
from carserver.core.prune import Pruner
from carserver.core.runstore import Clock, RunStore
from carserver.core.submissions import Proposals
from carserver.core.subscription import Subscription
from carserver.core.toolbox import Toolbox
from carserver.core.toolstream import Stream
from carserver.core.watch import Watch
from carserver.protocol.closing import Close
from carserver.protocol.frames import notification
from carserver.protocol.handshake import ServerSchema
from carserver.protocol.runs import WatchReset
from carserver.protocol.server import BackedUp, ServerStatus
from carserver.rpc.method import Table

_OUTER_RUNS = 64  # of one connection, within which others were started; of more the outermost is its run no more

Callback = Callable[[bool], None]
"""What is to happen once a reply is queued; it is told whether that says what the method answered."""


class Authority(Protocol):
    """Knows the tokens."""

    def principal_of(self, token: str) -> Principal | None:
        """Who holds it; None if nobody does."""
        ...


class Daemon(Protocol):
    """What methods may ask of the daemon as a whole."""

    @property
    def draining(self) -> bool:
        """Whether it takes no new work."""
        ...

    def status(self) -> ServerStatus:
        """Its state at a glance."""
        ...

    def discover(self) -> bytes:
        """Its OpenRPC document."""
        ...

    @property
    def car_schema(self) -> ServerSchema:
        """Of that document, the CAR dialect."""
        ...

    @property
    def table(self) -> Table:
        """All methods."""
        ...

    def new_id(self) -> str:
        """A random UUID (version 4)."""
        ...

    async def backup(self, path: str) -> BackedUp:
        """A copy of all that is stored, as a new file.

        Raises:
            RpcError: invalid_params, overloaded, unavailable.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class Services(Struct, frozen=True):
    """Everything a method may use: the stores and the daemon, never a socket or a file."""

    runs: RunStore
    outputs: OutputStore
    pruner: Pruner
    tools: HandleStore
    toolbox: Toolbox
    proposals: Proposals
    host: Board
    approvals: Approvals
    daemon: Daemon
    authority: Authority
    clock: Clock
    counters: Counters
    settings: Settings


class Transport(Protocol):
    """What a session wants of its connection."""

    def end(self, code: Close, reason: str) -> None:
        """Sends what waits, then closes."""
        ...

    def authenticated(self) -> None:
        """The session has a principal now."""
        ...

    def progressed(self) -> None:
        """A request was answered: there may be room for the next."""
        ...

    def give_turn(self) -> None:
        """A request was spawned that has not started: it does before the next message is looked at."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Goes on with a request that has to wait; it is cancelled when the connection ends."""
        ...


class Session:
    """One peer.

    Args:
        client_id: Random; what the peer is told and logs name it by.
        outbox: Its frames.
        transport: Its connection.
        services: The daemon's.
        principal: Who it acts as, if that is known already.
        provisional: Whether `session.auth` may change that (contract, section 5: where a Unix socket gave the first).
    """

    def __init__(
        self,
        client_id: str,
        outbox: Outbox,
        transport: Transport,
        services: Services,
        principal: Principal | None = None,
        *,
        provisional: bool = False,
    ) -> None:
        self.client_id = client_id
        self.outbox = outbox
        self.transport = transport
        self.services = services
        self.principal = principal
        self.provisional = provisional
        self.dialect = ""
        self.closed = False
        self.in_flight = 0  # requests that finish without the peer
        self.waiting = 0  # requests that wait on someone
        self.subscriptions: dict[str, Subscription] = {}
        self.watch: Watch | None = None
        self.tool_stream: Stream | None = None
        self.hosting: Hosting | None = None  # from the first tool on that it hosts
        self.seat: Seat | None = None  # at the host board, from its first word there on
        self.host_events: Follower | None = None
        self.halted: str | None = None  # what failed for good: no more proposals, until the peer reconnects
        self.current_run: str | None = None  # in the CAR dialect: the run that its proposals are part of
        self._outer_runs: deque[str] = deque(maxlen=_OUTER_RUNS)  # those that were it before, and may be again

    @property
    def acting(self) -> Principal:
        """Who it acts as; only methods that need no authentication run without."""
        assert self.principal is not None  # noqa: S101 - the dispatcher has refused
        return self.principal

    @property
    def hosts_for_itself(self) -> bool:
        """Whether the tools that it hosts are for itself: see `core.toolbox`."""
        return bool(self.dialect)

    def work_in(self, run_id: str, principal: Principal) -> bool:
        """Its proposals are part of that run from now on, unless it has come to act as somebody else meanwhile."""
        if self.principal != principal:
            return False
        if self.current_run not in (None, run_id):
            self._outer_runs.append(self.current_run)
        self.current_run = run_id
        return True

    def work_no_more_in(self, run_id: str) -> None:
        """That run is complete: its proposals are part of the run before it, where that goes on, else of none."""
        if self.current_run != run_id:
            return
        is_live = self.services.runs.attendance.is_live
        self.current_run = None
        while self._outer_runs and self.current_run is None:
            outer = self._outer_runs.pop()
            self.current_run = outer if is_live(outer) else None

    def host_tools(self) -> Hosting:
        """What runs the tools that it hosts."""
        if self.hosting is None:
            services = self.services
            self.hosting = Hosting(self.outbox, self.client_id, services.clock, services.settings)
        return self.hosting

    def take_seat(self) -> Seat:
        """What it has at the host board."""
        if self.seat is None:
            self.seat = Seat(self.client_id)
        return self.seat

    def authenticate(self, principal: Principal) -> None:
        """From now on it acts as `principal`; what it attended, followed, watched and hosted as somebody else ends."""
        if self.principal not in (None, principal):
            self._begin_anew(f"this connection acts as {principal.name} now")
        self.principal = principal
        self.transport.authenticated()

    def _begin_anew(self, reason: str) -> None:
        """Nothing is left of who it was: the new principal may not see, or own, what that one did. The peer is told."""
        runs = self.services.runs
        runs.attendance.leave(self)
        for subscription in list(self.subscriptions.values()):
            runs.hub.end(subscription, f"{reason}: subscribe again")
        if self.watch is not None:
            runs.watchers.drop(self.watch)
            self.watch = None
            self.outbox.send(notification("runs.watch.reset", WatchReset(reason=f"{reason}: watch again")))
        self._drop_tool_stream()
        self._host_no_more(reason)
        self._leave_seat(reason)
        self.current_run = None
        self._outer_runs.clear()
        self.services.tools.callers.leave(self)

    def _host_no_more(self, reason: str) -> None:
        """Its tools are gone, and what they run."""
        hosting, self.hosting = self.hosting, None
        if hosting is not None:
            self.services.toolbox.drop(hosting)
            hosting.close(reason)

    def _leave_seat(self, reason: str) -> None:
        """What it registered at the host board is gone. What it follows there goes on: that is for everyone."""
        seat, self.seat = self.seat, None
        if seat is not None:
            self.services.host.leave(seat, reason)

    def _drop_tool_stream(self) -> None:
        if self.tool_stream is not None:
            self.services.tools.streams.drop(self.tool_stream)
            self.tool_stream = None

    def deliver(self, _id: bytes | None, reply: bytes | None, then: Callback | None) -> None:
        """One call is done (`dispatcher.Receiver`): its reply is queued, then `then` happens."""
        if reply is not None:
            self.outbox.send(reply)
        if then is not None:
            then(True)

    def begin_request(self, *, waits: bool, pages: bool) -> None:
        """A request could not be answered at once: it waits on someone, or not; its answer may be a page, or not.

        One that waits on someone keeps no room for its answer: that would pause reading until that one has come, who
        may be this very peer.
        """
        if waits:
            self.waiting += 1
            return
        self.in_flight += 1
        if pages:
            self.outbox.reserved += self.services.settings.page_bytes

    def end_request(self, *, waits: bool, pages: bool) -> None:
        """It is answered, or given up."""
        if waits:
            self.waiting -= 1
        else:
            self.in_flight -= 1
            if pages:
                self.outbox.reserved -= self.services.settings.page_bytes
        self.transport.progressed()

    def said_all(self) -> None:
        """Nothing is heard of the peer any more, so it answers nothing: what it hosts is as good as gone."""
        self._host_no_more(GONE)

    def close(self) -> None:
        """The connection has ended: its subscriptions, its watch and its tools go, and it attends nothing any more."""
        if self.closed:
            return
        self.closed = True
        for subscription in list(self.subscriptions.values()):
            self.services.runs.hub.drop(subscription)
        if self.watch is not None:
            self.services.runs.watchers.drop(self.watch)
        self._drop_tool_stream()
        if self.host_events is not None:
            self.services.host.unfollow(self.host_events)
        self.services.runs.attendance.leave(self)
        self.outbox.discard()
        self._host_no_more(GONE)
        self._leave_seat(SESSION_GONE)
        self.services.tools.callers.leave(self)
