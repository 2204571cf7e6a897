"""The host board: the agents and devices that sessions have registered, and the events of all who follow it.

Contract, section 10, `host.subscribe`. In memory: what a session registered goes with it. What waits for a person's
word is kept in storage (`core.approvals`), and tells its events here. Like the hub, all of this is atomic on the loop.
"""

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from msgspec import Raw, UnsetType
from msgspec.structs import asdict

from carserver.config import Settings
from carserver.core.backlog import Backlog, Piece, Turns
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.runstore import Clock
from carserver.protocol.codec import encode
from carserver.protocol.errors import conflict, forbidden, limit_exceeded, not_found
from carserver.protocol.frames import notification
from carserver.protocol.host import HostAgent, HostAgentChange, HostDevice, HostEvent, HostIdentity
from carserver.protocol.trace import rfc3339

T = TypeVar("T", HostAgent, HostDevice)

GONE = "its session has ended"


class Seat:
    """What one session has at the board, from its first word there on; closed, when it ends or acts as another.

    Args:
        client_id: The session's.
    """

    __slots__ = ("agents", "client_id", "closed", "devices")

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.closed = False
        self.agents: set[str] = set()
        self.devices: set[str] = set()

    def __len__(self) -> int:
        """How many agents and devices it has registered."""
        return len(self.agents) + len(self.devices)


class Follower(Backlog[Piece]):
    """The events for one connection; `held` until it has the state that they follow on.

    Args:
        outbox: Where its frames go.
        settings: `stream_events`, `stream_bytes`, `watch_piece_bytes`.
        counters: What is counted.
    """

    __slots__ = ("_counters", "held")

    def __init__(self, outbox: Outbox, settings: Settings, counters: Counters) -> None:
        super().__init__(outbox, settings)
        self.held = True
        self._counters = counters

    def count_sent(self, messages: int) -> None:
        """See `core.backlog.Backlog`."""
        self._counters.host_events_delivered += messages

    def count_skip(self) -> None:
        """See `core.backlog.Backlog`."""
        self._counters.host_event_skips += 1

    def move(self) -> None:
        """See `core.backlog.Backlog`."""
        if not self.held:
            super().move()

    def release(self) -> None:
        """It has the state."""
        self.held = False
        self.move()


class Entry(NamedTuple, Generic[T]):
    """Something registered: whose it is, and as JSON, too."""

    seat: Seat
    value: T
    listed: bytes


Entries = dict[str, Entry[T]]
"""By their ids."""


class Board:
    """The board.

    Args:
        identity: The daemon's.
        clock: Time, timers.
        new_id: A random name.
        settings: `board_entries` and those that follow it, and those of a `Follower`.
        counters: What is counted.
    """

    def __init__(
        self, identity: HostIdentity, clock: Clock, new_id: Callable[[], str], settings: Settings, counters: Counters
    ) -> None:
        self.identity = identity
        self.new_id = new_id
        self.sequence = 0  # of the newest event
        self.bytes = 0  # of all agents and devices, as JSON
        self.agents: Entries[HostAgent] = {}
        self.devices: Entries[HostDevice] = {}
        self._clock = clock
        self._settings = settings
        self._counters = counters
        self._events: deque[bytes] = deque()  # the newest, as JSON
        self._events_bytes = 0
        self._followers: set[Follower] = set()
        self._turns = Turns(clock.call_later)

    def now(self) -> str:
        """The time, as the board tells it."""
        return rfc3339(self._clock.now_ms())

    # Agents and devices.

    def own_agent(self, seat: Seat, id_: str) -> HostAgent:
        """An agent that this session has registered.

        Raises:
            RpcError: not_found; forbidden for another session's.
        """
        return _own("agent", self.agents, seat, id_)

    def own_device(self, seat: Seat, id_: str) -> HostDevice:
        """A device that this session has registered.

        Raises:
            RpcError: not_found; forbidden for another session's.
        """
        return _own("device", self.devices, seat, id_)

    def register_agent(self, seat: Seat, agent: HostAgent) -> bytes:
        """An agent as JSON, on the board now; it takes the place of one's own with that id.

        Raises:
            RpcError: conflict (name_taken), limit_exceeded.
        """
        listed = self._put("agent", self.agents, seat.agents, seat, agent)
        self.publish("agent.registered", agent.id, f"agent {agent.name!r} is here", Raw(listed))
        return listed

    def register_device(self, seat: Seat, device: HostDevice) -> bytes:
        """A device as JSON, on the board now; it takes the place of one's own with that id.

        Raises:
            RpcError: conflict (name_taken), limit_exceeded.
        """
        listed = self._put("device", self.devices, seat.devices, seat, device)
        self.publish("device.registered", None, f"device {device.name!r} is here", Raw(listed))
        return listed

    def set_status(self, seat: Seat, agent: HostAgent, payload: Raw | UnsetType) -> bytes:
        """One's own agent as JSON, with another status; `payload` is told along with it.

        Raises:
            RpcError: limit_exceeded.
        """
        listed = self._put("agent", self.agents, seat.agents, seat, agent)
        message = agent.message or f"agent {agent.name!r} is {agent.status}"
        told = HostAgentChange(**asdict(agent), payload=payload)
        self.publish("agent.status_changed", agent.id, message, Raw(encode(told)))
        return listed

    def update_device(self, seat: Seat, device: HostDevice) -> bytes:
        """One's own device as JSON, changed.

        Raises:
            RpcError: limit_exceeded.
        """
        listed = self._put("device", self.devices, seat.devices, seat, device)
        self.publish("device.updated", None, f"device {device.name!r} has changed", Raw(listed))
        return listed

    def unregister_agent(self, seat: Seat, id_: str) -> None:
        """One's own agent is gone.

        Raises:
            RpcError: not_found; forbidden for another session's.
        """
        self.own_agent(seat, id_)
        self._remove_agent(seat, id_, "it was unregistered")

    def leave(self, seat: Seat, reason: str) -> None:
        """All that a session has registered is gone; the second time nothing happens."""
        seat.closed = True
        for id_ in sorted(seat.agents):
            self._remove_agent(seat, id_, reason)
        for id_ in sorted(seat.devices):
            entry = self._remove(self.devices, seat.devices, id_)
            words = f"device {entry.value.name!r} is gone: {reason}"
            self.publish("device.unregistered", None, words, Raw(entry.listed))

    def _remove_agent(self, seat: Seat, id_: str, reason: str) -> None:
        entry = self._remove(self.agents, seat.agents, id_)
        self.publish("agent.unregistered", id_, f"agent {entry.value.name!r} is gone: {reason}", Raw(entry.listed))

    def _put(self, what: str, entries: Entries[T], own: set[str], seat: Seat, value: T) -> bytes:
        there = entries.get(value.id)
        if there is not None and there.seat is not seat:
            raise conflict("name_taken", f"id: another session has registered the {what} {value.id!r}", path="id")
        listed = encode(value)
        more = len(listed) - (0 if there is None else len(there.listed))
        self._check_limits(seat, is_new=there is None, more=more)
        entries[value.id] = Entry(seat, value, listed)
        own.add(value.id)
        self.bytes += more
        return listed

    def _check_limits(self, seat: Seat, *, is_new: bool, more: int) -> None:
        settings = self._settings
        every = len(self.agents) + len(self.devices)
        if is_new and len(seat) >= settings.board_entries:
            raise limit_exceeded("board_entries", len(seat) + 1, settings.board_entries)
        if is_new and every >= settings.board_all_entries:
            raise limit_exceeded("board_all_entries", every + 1, settings.board_all_entries)
        if self.bytes + more > settings.board_bytes and more > 0:
            raise limit_exceeded("board_bytes", self.bytes + more, settings.board_bytes)

    def _remove(self, entries: Entries[T], own: set[str], id_: str) -> Entry[T]:
        entry = entries.pop(id_)
        own.remove(id_)
        self.bytes -= len(entry.listed)
        return entry

    def list_agents(self) -> bytes:
        """All agents, as JSON, in the order in which they came."""
        return b"[%b]" % b",".join(entry.listed for entry in self.agents.values())

    def list_devices(self) -> bytes:
        """All devices, as JSON, in the order in which they came."""
        return b"[%b]" % b",".join(entry.listed for entry in self.devices.values())

    # Events.

    def publish(self, kind: str, agent_id: str | None, message: str, payload: Raw) -> bytes:
        """The next event, as JSON: kept, and on its way to all who follow."""
        self.sequence += 1
        event = encode(
            HostEvent(
                id=self.new_id(),
                sequence=self.sequence,
                timestamp=self.now(),
                kind=kind,
                agent_id=agent_id,
                message=message,
                payload=payload,
            )
        )
        self._counters.host_events += 1
        self._keep(event)
        if self._followers:
            piece = Piece(notification("host.event", Raw(event)), len(event))
            for follower in self._followers:
                follower.offer(piece)
            self._turns.fed(self._followers)
        return event

    def _keep(self, event: bytes) -> None:
        events, settings = self._events, self._settings
        events.append(event)
        self._events_bytes += len(event)
        while len(events) > settings.board_events or (
            self._events_bytes > settings.board_events_bytes and len(events) > 1
        ):
            self._events_bytes -= len(events.popleft())

    def list_events(self, limit: int) -> bytes:
        """The newest events, as JSON, the newest last: at most so many."""
        first = max(len(self._events) - limit, 0)
        return b"[%b]" % b",".join(islice(self._events, first, None))

    # Who follows.

    def follow(self, outbox: Outbox) -> Follower:
        """A connection follows, from the next event on; nothing is sent before `release`."""
        follower = Follower(outbox, self._settings, self._counters)
        self._followers.add(follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        """It does not any more; the second time nothing happens."""
        follower.close()
        self._followers.discard(follower)

    @property
    def followers(self) -> int:
        """How many connections follow."""
        return len(self._followers)

    @property
    def waiting(self) -> int:
        """Events that wait for their peers, all together."""
        return sum(follower.waiting for follower in self._followers)


def _own(what: str, entries: Entries[T], seat: Seat, id_: str) -> T:
    entry = entries.get(id_)
    if entry is None:
        raise not_found(what, id_)
    if entry.seat is not seat:
        raise forbidden(f"another session has registered the {what} {id_!r}: only that one changes it")
    return entry.value
