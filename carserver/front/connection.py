"""One WebSocket: its opening handshake, its frames, its pings and its close; all else is any stream's (`stream`)."""

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from websockets.http11 import Request

from carserver.front import frames
from carserver.front.frames import CLOSE, PING, PONG, FrameReader
from carserver.front.handshake import Answer, Handshake, Page, Policy, Upgrade, decide
from carserver.front.stream import Register, State, Stream
from carserver.protocol.closing import Close

log = logging.getLogger("carserver.front")


class WebRegister(Register, Protocol):
    """What WebSockets want of the front end beside: who may connect, and the HTTP answer at a path."""

    policy: Policy
    page: Callable[[str], bytes]


class Connection(Stream):
    """A WebSocket, from the first byte of its upgrade request on."""

    def __init__(self, front: WebRegister) -> None:
        self._reader = FrameReader(front.settings.message_bytes_before_auth, "message_bytes_before_auth")
        super().__init__(front, self._reader, frames.text_frame)
        self._web = front
        self._handshake = Handshake(front.settings.handshake_bytes)
        self._heard = False  # anything, since the last ping

    # The socket's life, as asyncio tells it.

    def _admit(self) -> None:
        """The request has `handshake_s` to come."""
        self._set_timer(self._settings.handshake_s, self._handshake_too_slow)

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
        if self.session is not None:
            self.session.said_all()
        return None

    # The opening handshake.

    def _open(self, data: bytes) -> None:
        request = self._handshake.feed(data)
        if request is None:
            return
        if isinstance(request, Request):
            decision = decide(request, self._web.policy, self._front.full(self))
        else:
            decision = request
        if isinstance(decision, Upgrade):
            self._upgrade(decision)
        elif isinstance(decision, Page):
            self._answer(self._web.page(decision.path))
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

    def authenticated(self) -> None:
        """Messages may be large from now on, and pings begin."""
        super().authenticated()
        self._reader.max_bytes = self._settings.message_bytes
        self._reader.limit = "message_bytes"
        self._set_timer(self._settings.ping_s, self._ping)

    # Control frames.

    def _control(self, kind: int, payload: bytes) -> None:
        if kind == PING:
            # The newest alone: RFC 6455, 5.5.3 lets older ones go unanswered, so a flood of them fills no memory.
            self._newest = frames.pong_frame(payload)
            self._wake()
        elif kind == CLOSE:
            self._peer_closes(payload)
        else:
            assert kind == PONG  # noqa: S101 - that it was heard is all there is to it

    def _peer_closes(self, payload: bytes) -> None:
        """RFC 6455, 5.5.1: its close is answered with the same code, and the server closes first."""
        if self.state is State.OPEN:
            code, _ = frames.close_payload(payload)
            self.state = State.CLOSING
            self.outbox.seal(frames.close_frame(code))
        self._peer_closed = True
        self._set_timer(self._settings.close_s, self._transport.abort)
        self._wake()

    def _last_frame(self, code: Close, reason: str) -> bytes:
        return frames.close_frame(code, reason)

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

    def _go_on(self) -> None:
        """What the peer sent meanwhile was not seen, so the ping clock stood still."""
        self._heard = True
        self._read()

    def resume_writing(self) -> None:
        """The peer reads, so it is there."""
        self._heard = True
        super().resume_writing()
