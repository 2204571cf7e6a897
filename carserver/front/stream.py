"""What a connection is over any stream: it reads and dispatches in the protocol's callback, and drains once per tick.

The drain does nothing but move frames to the socket: all that waits, joined, in one write. It waits only where the
socket is congested, and that wait has a deadline: a peer that does not read is aborted and costs nobody else anything.
How bytes become messages, who may open a connection and how it says goodbye are the transport's.
"""

import asyncio
import logging
from collections.abc import Coroutine
from enum import Enum, auto
from typing import Any, Protocol, cast

from carserver.config import Settings
from carserver.core.outbox import Framing, Outbox
from carserver.core.principals import Principal
from carserver.front.frames import TEXT, Message, Violation
from carserver.front.reading import Reading
from carserver.protocol.closing import Close
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.session import Services, Session

log = logging.getLogger("carserver.front")


class State(Enum):
    """How far a connection is."""

    OPENING = auto()  # until the upgrade is answered
    OPEN = auto()
    CLOSING = auto()  # our last frame is queued or sent
    GONE = auto()


class Reader(Protocol):
    """Cuts what a peer sends into messages."""

    def next(self) -> Message | None:
        """The next one: TEXT is JSON to dispatch, all else is for the transport; None until there is more.

        Raises:
            Violation: the connection is to be closed with its code and reason.
        """
        ...


class Register(Protocol):
    """The front end, as its connections know it: what they share, and whom they tell how far they are."""

    loop: asyncio.AbstractEventLoop
    settings: Settings
    services: Services
    dispatcher: Dispatcher

    def accepted(self, connection: "Stream") -> bool:
        """A socket was accepted; False: it is one too many even to be refused in words."""
        ...

    def full(self, connection: "Stream") -> str | None:
        """The limit that leaves no room for this connection to open, if one does."""
        ...

    def session(self, connection: "Stream", principal: Principal | None, *, provisional: bool = False) -> Session:
        """A connection is open."""
        ...

    def authenticated(self, connection: "Stream") -> None:
        """It has a principal now."""
        ...

    def flush_soon(self, connection: "Stream") -> None:
        """It has something to send: at the end of this tick, joined with what else comes in it."""
        ...

    def lost(self, connection: "Stream") -> None:
        """Its socket is gone."""
        ...


class Stream(asyncio.Protocol):
    """A socket that was accepted; implements `rpc.session.Transport` once it is open.

    Args:
        front: Whose connection it is.
        reader: The transport's. It is fed by `data_received`, which is the transport's too.
        framing: Makes the transport's frame of one JSON text.
    """

    def __init__(self, front: Register, reader: Reader, framing: Framing) -> None:
        self._front = front
        self._loop = front.loop
        self._settings = front.settings
        self._high_water = front.settings.high_water_bytes
        self._counters = front.services.counters
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)  # from connection_made on
        self.state = State.OPENING
        self.address = ""
        self._messages = reader
        self.outbox = Outbox(framing, front.settings.outbox_bytes, self._wake)
        self.session: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None  # the one of the state: handshake, authentication, ping, close
        self._write_timer: asyncio.TimerHandle | None = None
        self._left_at_half = 0  # of a write that waits
        self._congested = False  # the transport holds more than high_water_bytes
        self._dirty = False  # among those that the front flushes at the end of this tick
        self._peer_closed = False  # it has said that nothing more comes
        self._deaf = False  # what comes cannot be understood any more
        self._newest: bytes | None = None  # goes behind what waits; a newer one takes its place

    # The socket's life, as asyncio tells it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepted."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._high_water, low=self._high_water)
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if type(peer) is tuple else ""
        self._reading = Reading(self._transport, self.outbox, self._must_wait, self._go_on, self._counters)
        if self._front.accepted(self):
            self._admit()
        else:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, and all that hung on it goes."""
        self.state = State.GONE
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._front.lost(self)
        if self.session is not None:
            self.session.close()
        for task in list(self._tasks):
            task.cancel()

    # What each transport has of its own.

    def _admit(self) -> None:
        """There is room for it: it may begin."""
        raise NotImplementedError

    def _control(self, kind: int, payload: bytes) -> None:
        """Something came that is not a message."""
        raise NotImplementedError

    def _last_frame(self, code: Close, reason: str) -> bytes:
        """Tells the peer why the connection ends."""
        raise NotImplementedError

    # Reading.

    def _read(self) -> None:
        """Takes messages until there are no more, or the peer has to wait; then writes what was answered at once."""
        session = self.session
        if session is None:
            return
        receive, reading, reader, outbox = self._front.dispatcher.receive, self._reading, self._messages, self.outbox
        self._dirty = True  # it is flushed at the end of this, so nobody needs to be told
        turn, in_flight = self._settings.turn_messages, self._settings.in_flight
        try:
            while not reading.paused:
                turn -= 1
                if turn < 0:
                    reading.give_turn()
                    break
                if (session.in_flight >= in_flight or outbox.full) and self._must_wait():
                    reading.wait()
                    break
                message = reader.next()
                if message is None:
                    break
                kind, payload = message
                if kind == TEXT:
                    if self.state is State.OPEN:
                        receive(session, payload)
                else:
                    self._control(kind, payload)
        except Violation as violation:
            self._violated(violation)
        finally:
            self.flush()

    def _violated(self, violation: Violation) -> None:
        self._counters.protocol_violations += 1
        self._deaf = True
        self.end(violation.code, violation.reason)

    def _must_wait(self) -> bool:
        """Whether the peer has asked for as much as may be under way."""
        session = self.session
        if session is None or self.state is not State.OPEN:
            return False
        return session.in_flight >= self._settings.in_flight or self.outbox.full

    def _go_on(self) -> None:
        """Reading goes on; what was read before is looked at first."""
        self._read()

    # rpc.session.Transport.

    def end(self, code: Close, reason: str) -> None:
        """Sends what waits and the last frame; the peer has `close_s` to go."""
        if self.state is not State.OPEN:
            return
        self.state = State.CLOSING
        if self.session is not None:
            self.session.said_all()
        log.info("closing: %s", reason, extra={"client": self._client_id(), "code": int(code)})
        self.outbox.seal(self._last_frame(code, reason))
        self._cancel_timer()
        self._reading.changed()  # to see it go

    def drop_unauthenticated(self, reason: str, code: Close) -> None:
        """It waited too long, or another one needs its place."""
        self._counters.unauthenticated_dropped += 1
        self.end(code, reason)

    def authenticated(self) -> None:
        """The session has a principal now, or another one."""
        self._front.authenticated(self)

    def progressed(self) -> None:
        """A request was answered."""
        self._reading.changed()

    def give_turn(self) -> None:
        """What was begun is to start before the next message is looked at."""
        self._reading.give_turn()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A request that waits; it ends with the connection."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The drain.

    def _wake(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._front.flush_soon(self)

    def flush(self) -> None:
        """Moves what waits to the socket, until that is congested."""
        self._dirty = False
        outbox = self.outbox
        while outbox.size and not self._congested:
            self._transport.write(outbox.take(self._high_water))
        if self._newest is not None and not self._congested and self.state is State.OPEN:
            newest, self._newest = self._newest, None
            self._transport.write(newest)
        if outbox.sealed and not outbox.size and self.state is State.CLOSING:
            self._said_all()

    def _said_all(self) -> None:
        """The last frame is with the transport: it ends with the peer's, or after `close_s`."""
        if self._peer_closed:
            self._transport.close()
        elif self._timer is None:
            self._set_timer(self._settings.close_s, self._transport.abort)
            if self._deaf:
                # Its own end would not be seen: the end of the stream asks for it, so nobody waits close_s.
                self._transport.write_eof()

    @property
    def unsent_bytes(self) -> int:
        """What waits for the peer: in the outbox and in the transport."""
        return self.outbox.size + self._transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        """The transport is over its high-water mark: the peer has `write_s` to take enough of it."""
        self._congested = True
        if self._write_timer is None:
            self._look_at_write(half=0)

    def resume_writing(self) -> None:
        """Below the mark again: the peer reads."""
        self._congested = False
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self.flush()

    def _look_at_write(self, half: int) -> None:
        """After half of the time it is seen how much is left, after all of it, whether that was enough."""
        self._left_at_half = self._transport.get_write_buffer_size()
        then = self._write_too_slow if half else lambda: self._look_at_write(half=1)
        self._write_timer = self._loop.call_later(self._settings.write_s / 2, then)

    def _write_too_slow(self) -> None:
        left = self._transport.get_write_buffer_size()
        if left < min(self._high_water, self._left_at_half):
            # Below the mark, and the peer reads: uvloop says so only when a whole write is through.
            self._look_at_write(half=0)
            return
        self._counters.write_timeouts += 1
        log.warning(
            "aborted: the peer has not read for write_s (%g)",
            self._settings.write_s,
            extra={"client": self._client_id()},
        )
        self._transport.abort()

    def abort(self) -> None:
        """The end, now."""
        self._transport.abort()

    def _client_id(self) -> str:
        return self.session.client_id if self.session is not None else ""

    def _set_timer(self, delay_s: float, callback: Any) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(delay_s, callback)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
