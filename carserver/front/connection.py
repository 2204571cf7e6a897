"""One WebSocket: it reads and dispatches in the protocol's callback, and drains its outbox once per tick.

The drain does nothing but move frames to the socket: all that waits, joined, in one write. It waits only where the
socket is congested, and that wait has a deadline: a peer that does not read is aborted and costs nobody else anything.
"""

import asyncio
import logging
from collections.abc import Coroutine
from enum import Enum, auto
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from websockets.http11 import Request

from carserver.core.outbox import Outbox
from carserver.front import frames
from carserver.front.frames import CLOSE, PING, PONG, FrameReader, Violation
from carserver.front.handshake import Answer, Handshake, Page, Upgrade, decide
from carserver.front.reading import Reading
from carserver.protocol.closing import Close
from carserver.rpc.session import Session

if TYPE_CHECKING:
    from carserver.front.websocket import Front

log = logging.getLogger("carserver.front")


class State(Enum):
    """How far a connection is."""

    OPENING = auto()  # until the upgrade is answered
    OPEN = auto()
    CLOSING = auto()  # our close frame is queued or sent
    GONE = auto()


class Connection(asyncio.Protocol):
    """A socket that was accepted; implements `rpc.session.Transport` once it is open."""

    def __init__(self, front: "Front") -> None:
        self._front = front
        self._loop = front.loop
        self._settings = front.settings
        self._high_water = front.settings.high_water_bytes
        self._counters = front.services.counters
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)  # from connection_made on
        self.state = State.OPENING
        self.address = ""
        self._handshake = Handshake(front.settings.handshake_bytes)
        self._reader = FrameReader(front.settings.message_bytes_before_auth, "message_bytes_before_auth")
        self.outbox = Outbox(frames.text_frame, front.settings.outbox_bytes, self._wake)
        self.session: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None  # the one of the state: handshake, authentication, ping, close
        self._write_timer: asyncio.TimerHandle | None = None
        self._left_at_half = 0  # of a write that waits
        self._congested = False  # the transport holds more than high_water_bytes
        self._dirty = False  # among those that the front flushes at the end of this tick
        self._heard = False  # anything, since the last ping
        self._peer_closed = False  # its close frame has come
        self._deaf = False  # what comes cannot be understood any more
        self._pong: bytes | None = None  # the newest ping's answer: RFC 6455, 5.5.3 lets older ones go unanswered

    # The socket's life, as asyncio tells it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepted: the request has `handshake_s` to come."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._high_water, low=self._high_water)
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if peer else ""
        self._reading = Reading(self._transport, self.outbox, self._must_wait, self._go_on, self._counters)
        if self._front.accepted(self):
            self._set_timer(self._settings.handshake_s, self._handshake_too_slow)
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Whatever is whole by now is dealt with at once, and answered with one write."""
        self._heard = True
        if self.state is State.OPENING:
            self._open(data)
        else:
            self._reader.feed(data)
            self._read()
            if len(data) >= self._settings.turn_bytes and not self._reading.paused:
                self._reading.give_turn()

    def eof_received(self) -> bool | None:
        """The peer is gone, with no close frame: the transport closes after what is written already."""
        return None

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

    # The opening handshake.

    def _open(self, data: bytes) -> None:
        request = self._handshake.feed(data)
        if request is None:
            return
        if isinstance(request, Request):
            decision = decide(request, self._front.policy, self._front.full(self))
        else:
            decision = request
        if isinstance(decision, Upgrade):
            self._upgrade(decision)
        elif isinstance(decision, Page):
            self._answer(self._front.page(decision.path))
        else:
            self._refuse(decision)

    def _upgrade(self, decision: Upgrade) -> None:
        self._transport.write(decision.response)
        self.state = State.OPEN
        self.session = self._front.session(self, decision.principal)
        self._reader.feed(self._handshake.leftover)
        del self._handshake
        if decision.principal is None:
            self._set_timer(self._settings.auth_s, self._authentication_too_slow)
        else:
            self.authenticated()
        self._read()

    def _refuse(self, answer: Answer) -> None:
        self._counters.handshakes_refused += 1
        self._counters.wrong_tokens += answer.status == HTTPStatus.UNAUTHORIZED
        log.info("handshake refused: %s", answer.reason, extra={"status": answer.status})
        self._answer(answer.response)

    def _answer(self, response: bytes) -> None:
        """An HTTP answer is the last word."""
        self.state = State.CLOSING
        self._transport.write(response)
        self._set_timer(self._settings.close_s, self._transport.abort)
        self._transport.close()

    def _handshake_too_slow(self) -> None:
        self._counters.handshakes_refused += 1
        self._transport.abort()

    def _authentication_too_slow(self) -> None:
        self.drop_unauthenticated(f"not authenticated within auth_s ({self._settings.auth_s:g})", Close.POLICY)

    def drop_unauthenticated(self, reason: str, code: Close) -> None:
        """It waited too long, or another one needs its place."""
        self._counters.unauthenticated_dropped += 1
        self.end(code, reason)

    # Reading.

    def _read(self) -> None:
        """Takes messages until there are no more, or the peer has to wait; then writes what was answered at once."""
        session = self.session
        if session is None:
            return
        receive, reading, reader, outbox = self._front.dispatcher.receive, self._reading, self._reader, self.outbox
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
                opcode, payload = message
                if opcode == frames.TEXT:
                    if self.state is State.OPEN:
                        receive(session, payload)
                else:
                    self._control(opcode, payload)
        except Violation as violation:
            self._counters.protocol_violations += 1
            self._deaf = True
            self.end(violation.code, violation.reason)
        finally:
            self.flush()

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._pong = payload
            self._wake()
        elif opcode == CLOSE:
            self._peer_closes(payload)
        else:
            assert opcode == PONG  # noqa: S101 - that it was heard is all there is to it

    def _peer_closes(self, payload: bytes) -> None:
        """RFC 6455, 5.5.1: its close is answered with the same code, and the server closes first."""
        if self.state is State.OPEN:
            code, _ = frames.close_payload(payload)
            self.state = State.CLOSING
            self.outbox.seal(frames.close_frame(code))
        self._peer_closed = True
        self._set_timer(self._settings.close_s, self._transport.abort)
        self._wake()

    def _must_wait(self) -> bool:
        """Whether the peer has asked for as much as may be under way."""
        session = self.session
        if session is None or self.state is not State.OPEN:
            return False
        return session.in_flight >= self._settings.in_flight or self.outbox.full

    def _go_on(self) -> None:
        """Reading goes on: what the peer sent meanwhile was not seen, so the ping clock stood still."""
        self._heard = True
        self._read()

    # rpc.session.Transport.

    def end(self, code: Close, reason: str) -> None:
        """Sends what waits and a close frame; the peer has `close_s` to answer it."""
        if self.state is not State.OPEN:
            return
        self.state = State.CLOSING
        log.info("closing: %s", reason, extra={"client": self._client_id(), "code": int(code)})
        self.outbox.seal(frames.close_frame(code, reason))
        self._cancel_timer()
        self._reading.changed()  # to see its close frame

    def authenticated(self) -> None:
        """Messages may be large from now on, and pings begin."""
        self._front.authenticated(self)
        self._reader.max_bytes = self._settings.message_bytes
        self._reader.limit = "message_bytes"
        self._set_timer(self._settings.ping_s, self._ping)

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

    # Pings.

    def _ping(self) -> None:
        if self._reading.paused:
            self._set_timer(self._settings.ping_s, self._ping)
            return
        self._heard = self._congested  # a peer that is behind is the write timeout's
        if not self._congested:
            self._transport.write(frames.ping_frame())  # past the outbox: what waits there is no fault of the peer's
        self._set_timer(self._settings.pong_s, self._check_heard)

    def _check_heard(self) -> None:
        if self._heard or self._reading.paused:
            self._set_timer(max(self._settings.ping_s - self._settings.pong_s, 0), self._ping)
        else:
            self._counters.ping_timeouts += 1
            self.end(Close.INTERNAL, f"no answer to a ping within pong_s ({self._settings.pong_s:g})")

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
        if self._pong is not None and not self._congested and self.state is State.OPEN:
            pong, self._pong = self._pong, None
            self._transport.write(frames.pong_frame(pong))
        if not outbox.sealed or outbox.size or self.state is not State.CLOSING:
            return
        if self._peer_closed:
            self._transport.close()
        elif self._timer is None:
            self._set_timer(self._settings.close_s, self._transport.abort)
            if self._deaf:
                # Its close frame would not be seen: the end of the stream asks it to close, so nobody waits close_s.
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
        self._heard = True
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
