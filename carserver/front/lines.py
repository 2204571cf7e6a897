"""One JSON-RPC message a line, both ways: what a Unix socket and standard input and output have in common.

A line ends with LF (CR before it is white space of JSON). The peer is told by the kernel's credentials or by how the
daemon was started, so there is no handshake and no time before authentication. Where a WebSocket has a close frame,
a line peer gets one last line, the notification `server.closing`, and the end of the stream. There are no pings: the
kernel tells when a peer on this machine is gone.
"""

import select
from typing import Final

import msgspec

from carserver.core.principals import Principal
from carserver.front.frames import TEXT, Message, Violation, check_utf8
from carserver.front.stream import Register, State, Stream
from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind, RpcError, limit_exceeded
from carserver.protocol.frames import error_frame, notification
from carserver.protocol.server import Closing

BLANK: Final = -1  # kinds of line beside TEXT
NOT_UTF8: Final = -2  # the payload says where
_WHITE_SPACE: Final = b" \t\r"  # JSON's (RFC 8259, 2), and no more; LF ends the line


class LineTooLong(Violation):
    """A line has more than `message_bytes`."""

    def __init__(self, size: int, maximum: int) -> None:
        super().__init__(Close.TOO_BIG, f"line over message_bytes ({maximum})")
        self.error = limit_exceeded("message_bytes", size, maximum, "line")


def line(payload: bytes) -> bytes:
    """One JSON text as a line. What the daemon makes has no line break; what a method of others hands in may have."""
    if b"\n" in payload:
        payload = msgspec.json.format(payload, indent=-1)
    return payload + b"\n"


class LineReader:
    """Cuts what a peer sends into lines: TEXT (valid UTF-8), NOT_UTF8, BLANK.

    `feed` takes bytes, `next` gives one line at a time, until a LineTooLong; then both do nothing. Each byte is looked
    at once, however small the reads that a line comes in. Held are at most `max_bytes` and one read.
    """

    __slots__ = ("_at", "_data", "_ended", "_max_bytes", "_sought")

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds one line, its end not counted."""
        self._max_bytes = max_bytes
        self._data: bytes | bytearray = b""  # a bytearray as soon as something was held over
        self._at = 0  # of the first byte in _data that is in no line yet
        self._sought = 0  # up to here there is no line's end
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Takes what was read. With nothing held over, nothing is copied."""
        if self._ended:
            return
        if self._at == len(self._data):
            self._data = data
            self._at = self._sought = 0
        else:
            held = self._hold()
            held += data

    def finish(self) -> None:
        """Nothing more comes: what is held is the last line. A piece of a request is no JSON, so none is mistaken."""
        if self._at < len(self._data):
            self.feed(b"\n")

    def next(self) -> Message | None:
        """The next line without its end, or None until more bytes are fed.

        Raises:
            LineTooLong: the connection is to be closed with its code and reason.
        """
        data, at = self._data, self._at
        stop = data.find(b"\n", self._sought)
        size = (stop if stop >= 0 else len(data)) - at
        if size > self._max_bytes:
            self._ended = True
            self._data = b""
            self._at = self._sought = 0
            raise LineTooLong(size, self._max_bytes)
        if stop < 0:
            self._sought = len(self._hold())
            return None
        self._at = self._sought = stop + 1
        payload = data[at:stop] if type(data) is bytes else bytes(memoryview(data)[at:stop])
        if payload.isascii():
            return (TEXT if payload.strip(_WHITE_SPACE) else BLANK), payload
        try:
            check_utf8(payload)
        except Violation as violation:
            return NOT_UTF8, violation.reason.encode()
        return TEXT, payload

    def _hold(self) -> bytearray:
        """Keeps what is in no line yet, and only that, as a bytearray: it grows in amortised linear time."""
        data = self._data
        if isinstance(data, bytearray):
            del data[: self._at]
        else:
            data = self._data = bytearray(memoryview(data)[self._at :])
        self._sought -= self._at
        self._at = 0
        return data


class LineConnection(Stream):
    """A peer that speaks in lines."""

    def __init__(self, front: Register) -> None:
        self._reader = LineReader(front.settings.message_bytes)
        super().__init__(front, self._reader, line)

    def _begin(self, principal: Principal, *, provisional: bool = False) -> None:
        """It is open; `provisional`: `session.auth` may change who it acts as."""
        self.state = State.OPEN
        self.session = self._front.session(self, principal, provisional=provisional)

    # The stream's life, as asyncio tells it.

    def data_received(self, data: bytes) -> None:
        """Whatever is whole by now is dealt with at once; once the connection ends, nothing is."""
        if self.state is State.OPEN:
            self._reader.feed(data)
            self._read()
            if len(data) >= self._settings.turn_bytes and not self._reading.paused:
                self._reading.give_turn()

    def eof_received(self) -> bool:
        """The peer sends no more: what it sent is still answered. Told again whenever reading goes on."""
        if not self._peer_closed:
            self._peer_closed = True
            self._reader.finish()
            self._read()
            self._look_whether_gone()
        return True

    def _look_whether_gone(self) -> None:
        """One that said all it has to say may wait for answers, or be gone: after its end asyncio does not tell."""
        if self._transport.is_closing():
            return
        watch = select.poll()
        watch.register(self._transport.get_extra_info("socket"), 0)  # POLLHUP is told unasked
        if watch.poll(0):
            self._transport.abort()
        elif self.state is State.OPEN:
            self._set_timer(self._settings.ping_s, self._look_whether_gone)
            self._look_whether_answered()

    def _look_whether_answered(self) -> None:
        session = self.session
        if self._peer_closed and self.state is State.OPEN and not self._reading.paused and session is not None:
            session.said_all()  # first: what waits may wait for what it hosts
            if not (session.in_flight or session.waiting):
                self._answered()

    def _answered(self) -> None:
        """All that the peer sent is answered, and it sends no more: the stream ends with the last answer."""
        self.state = State.CLOSING
        self._cancel_timer()
        self.outbox.seal()

    def _go_on(self) -> None:
        self._read()
        self._look_whether_answered()

    def progressed(self) -> None:
        super().progressed()
        self._look_whether_answered()

    # What a line is beside a message, and the end.

    def _control(self, kind: int, payload: bytes) -> None:
        if kind == NOT_UTF8 and self.state is State.OPEN:
            self._counters.errors += 1
            self._tell(RpcError(ErrorKind.PARSE_ERROR, f"not JSON: {payload.decode()}"))

    def _violated(self, violation: Violation) -> None:
        if isinstance(violation, LineTooLong) and self.state is State.OPEN:
            self._counters.errors += 1
            self._tell(violation.error)
        super()._violated(violation)

    def _tell(self, error: RpcError) -> None:
        self.outbox.send(error_frame(b"null", error))

    def _last_frame(self, code: Close, reason: str) -> bytes:
        return line(notification("server.closing", Closing(code=code, reason=reason)))

    def _said_all(self) -> None:
        """The end of the stream says it too. The peer has `write_s` to take what is written, and `close_s` to go."""
        if self._timer is None:
            patience = self._loop.time() + self._settings.write_s
            self._set_timer(self._settings.close_s, lambda: self._close_too_slow(patience))
        if self._peer_closed:
            self._transport.close()
        else:
            self._transport.write_eof()

    def _close_too_slow(self, patience: float) -> None:
        if self._transport.get_write_buffer_size() and self._loop.time() < patience:
            self._set_timer(self._settings.close_s, lambda: self._close_too_slow(patience))
        else:
            self._transport.abort()
