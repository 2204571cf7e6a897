"""WebSocket frames after the opening handshake: bytes in, messages out, and the frames we send. No I/O here.

RFC 6455 without extensions, server side. It knows no JSON and no session; what a message means and when to stop reading
are its caller's. It exists beside `websockets`' own parser because that one costs a generator step, an enum and a
dataclass per frame: measured, five to ten times the time of everything else that a small request needs.
"""

from codecs import utf_8_decode
from collections.abc import Callable
from struct import Struct
from typing import Final

from carserver.protocol.closing import Close

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled module: slower, the same result
    from websockets.utils import apply_mask

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

NO_STATUS: Final = 1005  # "no code was there" (7.1.5); never on the wire
CONTROL_BYTES: Final = 125  # of a control frame's payload (5.5)
REASON_BYTES: Final = CONTROL_BYTES - 2

Message = tuple[int, bytes]
"""`(opcode, payload)`: TEXT (whole, valid UTF-8), PING, PONG or CLOSE (its payload is valid: see `close_payload`)."""

_FIN = 0x80
_MASKED = 0x80
_RSV = 0x70
_FIN_TEXT = _FIN | TEXT
_OPCODES = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})
# 7.4.1 and the IANA registry; 3000-4999 are free. 1004, 1005, 1006 and 1015 must not be sent.
_CODES = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})

_LENGTH_16 = Struct("!H")
_LENGTH_64 = Struct("!Q")
_SHORT_HEADS = tuple(bytes((_FIN_TEXT, length)) for length in range(126))
_pack_16: Callable[..., bytes] = Struct("!BBH").pack
_pack_64: Callable[..., bytes] = Struct("!BBQ").pack

# A copy of a small slice costs less than making a view of it; a big one is unmasked from where it lies.
_VIEW_BYTES = 4_096
# UTF-8 is checked in pieces: decoding 16 MiB with one emoji in it would allocate 64 MiB.
_UTF8_PIECE = 65_536


class Violation(Exception):
    """The peer broke the protocol or a limit: close with this code and reason, read no more."""

    def __init__(self, code: Close, reason: str) -> None:
        super().__init__(f"{code.value} {reason}")
        self.code = code
        self.reason = reason


def text_frame(payload: bytes) -> bytes:
    """One whole text message; `payload` is UTF-8, which is not checked here."""
    length = len(payload)
    if length < 126:
        return _SHORT_HEADS[length] + payload
    if length < 65_536:
        return _pack_16(_FIN_TEXT, 126, length) + payload
    return _pack_64(_FIN_TEXT, 127, length) + payload


def ping_frame(payload: bytes = b"") -> bytes:
    """A ping; `payload` has at most 125 bytes."""
    return _control_frame(PING, payload)


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping, with the ping's own payload (5.5.3), at most 125 bytes."""
    return _control_frame(PONG, payload)


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; the reason is cut to 123 bytes between two characters.

    `NO_STATUS` gives a frame without payload, so that `close_frame(*close_payload(payload))` echoes any close.
    """
    if code == NO_STATUS:
        return _control_frame(CLOSE, b"")
    # A lone surrogate becomes "?": a reason must never be what makes closing fail.
    cut = reason.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore")
    return _control_frame(CLOSE, _LENGTH_16.pack(code) + cut.encode())


def close_payload(payload: bytes) -> tuple[int, str]:
    """Code and reason of a close frame; `(NO_STATUS, "")` for an empty one.

    Raises:
        Violation: one byte, a code that must not be sent (1002), a reason that is not UTF-8 (1007).
    """
    if not payload:
        return NO_STATUS, ""
    if len(payload) == 1:
        raise Violation(Close.PROTOCOL_ERROR, "close frame of one byte")
    (code,) = _LENGTH_16.unpack_from(payload)
    if code not in _CODES and not 3000 <= code <= 4999:
        raise Violation(Close.PROTOCOL_ERROR, f"close code {code} must not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise Violation(Close.INVALID_DATA, "close reason is not UTF-8") from None


def _control_frame(opcode: int, payload: bytes) -> bytes:
    if len(payload) > CONTROL_BYTES:
        raise ValueError(f"a control frame has at most {CONTROL_BYTES} bytes, not {len(payload)}")
    return bytes((_FIN | opcode, len(payload))) + payload


class FrameReader:
    """Cuts what a client sends into messages.

    `feed` takes bytes, `next` gives one message at a time; what `next` was not called for stays, uninterpreted, so a
    change of `max_bytes` between two calls holds for the second message of the same read. The reader ends with a
    Violation or with the peer's CLOSE (1.4: "a peer discards any further data received"); then both do nothing.

    Bytes are held in two places, both bounded by the caller: a frame that is not complete (at most `max_bytes` and
    one read) and the message that fragments have built up (at most `max_bytes`, however small they are).
    """

    __slots__ = ("_at", "_data", "_ended", "_message", "limit", "max_bytes")

    def __init__(self, max_bytes: int, limit: str = "message_bytes") -> None:
        """`max_bytes` bounds one message, all fragments together; `limit` is its setting's name, for the reason.

        Both may be changed at any time. Control frames do not count.
        """
        self.max_bytes = max_bytes
        self.limit = limit
        self._data: bytes | bytearray = b""  # a bytearray as soon as something was held over
        self._at = 0  # of the first byte in _data that is not parsed
        self._message: bytearray | None = None  # the fragments so far; not a list, or empty ones would grow it
        self._ended = False

    @property
    def pending_bytes(self) -> int:
        """How many bytes were fed and not parsed."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """Takes what was read from the socket. With nothing held over, nothing is copied."""
        if self._ended:
            return
        if self._at == len(self._data):
            self._data = data
            self._at = 0
        else:
            held = self._hold()
            held += data

    def next(self) -> Message | None:
        """The next message, or None until more bytes are fed.

        Raises:
            Violation: the connection is to be closed with its code and reason.
        """
        data = self._data
        at = self._at
        end = len(data)
        if at == end:
            if at:
                # An idle connection must not pin its last read.
                self._data = b""
                self._at = 0
            return None
        try:
            # What nearly every frame is: a text message below 64 KiB, masked, whole, complete. All else takes the long
            # way, which alone knows what is wrong with a frame; this one only has to be sure of what is right.
            if data[at] == _FIN_TEXT and end - at >= 8 and self._message is None:
                length = data[at + 1] - _MASKED
                if length == 126:
                    length = data[at + 2] << 8 | data[at + 3]
                    body = at + 8
                    usual = length >= 126
                else:
                    body = at + 6
                    usual = 0 <= length < 126
                stop = body + length
                if usual and stop <= end and length <= self.max_bytes:
                    self._at = stop
                    payload = apply_mask(data[body:stop], data[body - 4 : body])
                    if not payload.isascii():
                        check_utf8(payload)
                    return TEXT, payload
            return self._next_of_any_kind()
        except Violation:
            self._end()
            raise

    def _next_of_any_kind(self) -> Message | None:
        while (frame := self._frame()) is not None:
            first, payload = frame
            opcode = first & 0x0F
            if opcode >= CLOSE:
                if opcode == CLOSE:
                    close_payload(payload)
                    self._end()
                return opcode, payload
            message = self._join(payload, last=bool(first & _FIN))
            if message is not None:
                if not message.isascii():
                    check_utf8(message)
                return TEXT, message
        return None

    def _join(self, payload: bytes, *, last: bool) -> bytes | None:
        """The message, or None until its last fragment is there (5.4)."""
        message = self._message
        if message is None:
            if last:
                return payload
            self._message = bytearray(payload)
            return None
        message += payload
        if not last:
            return None
        self._message = None
        return bytes(message)

    def _frame(self) -> tuple[int, bytes] | None:
        """The first byte and the unmasked payload of the next frame, or None while it is not complete."""
        data = self._data
        at = self._at
        end = len(data)
        if end - at < 2:
            self._hold()
            return None
        first = data[at]
        second = data[at + 1]
        self._check_head(first, second)
        length = second & 0x7F
        mask_at = at + 2
        if length >= 126:
            field = _LENGTH_16 if length == 126 else _LENGTH_64
            if end - mask_at < field.size:
                self._hold()
                return None
            (length,) = field.unpack_from(data, mask_at)
            mask_at += field.size
            _check_minimal(length, field.size)
        if first & 0x0F < CLOSE:
            self._check_size(length)
        body = mask_at + 4
        stop = body + length
        if stop > end:
            self._hold()
            return None
        masked = data[body:stop] if length < _VIEW_BYTES else memoryview(data)[body:stop]
        payload = apply_mask(masked, data[mask_at:body])
        self._at = stop
        return first, payload

    def _check_head(self, first: int, second: int) -> None:
        """What the first two bytes tell: 5.2, 5.4 and 5.5."""
        opcode = first & 0x0F
        if first & _RSV:
            raise Violation(Close.PROTOCOL_ERROR, "reserved bits set: no extension was negotiated")
        if opcode not in _OPCODES:
            raise Violation(Close.PROTOCOL_ERROR, f"reserved opcode {opcode:#x}")
        if not second & _MASKED:
            raise Violation(Close.PROTOCOL_ERROR, "frame of a client without mask")
        if opcode >= CLOSE:
            if not first & _FIN:
                raise Violation(Close.PROTOCOL_ERROR, "control frame in fragments")
            if second & 0x7F > CONTROL_BYTES:
                raise Violation(Close.PROTOCOL_ERROR, f"control frame over {CONTROL_BYTES} bytes")
        elif opcode == CONTINUATION:
            if self._message is None:
                raise Violation(Close.PROTOCOL_ERROR, "continuation without a message")
        elif self._message is not None:
            raise Violation(Close.PROTOCOL_ERROR, "new message inside a fragmented one")
        elif opcode == BINARY:
            raise Violation(Close.UNSUPPORTED_DATA, "binary message: send JSON-RPC 2.0 as text")

    def _check_size(self, length: int) -> None:
        """Refuses by the declared length, before its bytes are taken in."""
        before = 0 if self._message is None else len(self._message)
        if before + length > self.max_bytes:
            raise Violation(Close.TOO_BIG, f"message over {self.limit} ({self.max_bytes})")

    def _hold(self) -> bytearray:
        """Keeps what is not parsed, and only that, as a bytearray: it grows in amortised linear time.

        Forgetting a bytearray's beginning moves nothing (CPython keeps an offset).
        """
        data = self._data
        if isinstance(data, bytearray):
            del data[: self._at]
        else:
            data = self._data = bytearray(memoryview(data)[self._at :])
        self._at = 0
        return data

    def _end(self) -> None:
        self._ended = True
        self._data = b""
        self._at = 0
        self._message = None


def _check_minimal(length: int, size: int) -> None:
    """5.2: "the minimal number of bytes MUST be used", and "the most significant bit MUST be 0"."""
    if length < (126 if size == _LENGTH_16.size else 65_536):
        raise Violation(Close.PROTOCOL_ERROR, "length not in its shortest form")
    if length >> 63:
        raise Violation(Close.PROTOCOL_ERROR, "length with its highest bit set")


def check_utf8(payload: bytes) -> None:
    """A text message is UTF-8 as a whole (8.1); a character may be split between fragments, so not before the end."""
    at = 0
    view = memoryview(payload)
    try:
        while at < len(payload):
            stop = at + _UTF8_PIECE
            at += utf_8_decode(view[at:stop], "strict", stop >= len(payload))[1]
    except UnicodeDecodeError as error:
        raise Violation(Close.INVALID_DATA, f"text message is not UTF-8 at byte {at + error.start}") from None
