"""What a run has to record and the daemon has not acknowledged yet: bounded, in order, for any thread.

An event stays in the account until it is acknowledged, so the bounds hold for what is under way, too.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import msgspec
from msgspec import Struct

EVENT_BYTES: Final = 15 * 1024 * 1024  # of one event; more fits no message of a daemon with its default settings
BRACKETS: Final = 100_000  # opening ones in a batch; the daemon takes 131,072 in a message
NESTING: Final = 48  # of brackets within an event (contract, section 3)
TEXT_BYTES: Final = 64 * 1024  # of the pieces of text that become one event; a longer piece is split
_TEXT_CHARACTERS: Final = 10_000  # as JSON at most six bytes each
_TEXT_EVENT: Final = b'{"type":"text_delta","text":"%b"}'

_encode = msgspec.json.Encoder().encode


class _Type(Struct):
    type: str


_type_decoder = msgspec.json.Decoder(_Type)


class Entry(NamedTuple):
    """An event that waits: its JSON, when it happened (milliseconds since 1970), its opening brackets."""

    raw: bytes
    at_ms: int
    brackets: int


def entry(event: object, at_ms: int) -> Entry:
    """An event as it waits.

    Args:
        event: an object with a string `type`: a dict, a msgspec Struct, or JSON as bytes or `msgspec.Raw`.
        at_ms: when it happened.

    Raises:
        TypeError, ValueError: it is none, or no message can carry it. JSON is looked at as the daemon would, since
            one event that is no JSON would take down with it whatever else is in the message.
    """
    plain = type(event) is dict and type(event.get("type")) is str  # as most are: there is nothing to look at
    given = not plain and isinstance(event, (bytes, bytearray, msgspec.Raw))
    raw = bytes(cast("bytes", event)) if given else _encode(event)
    if len(raw) > EVENT_BYTES:
        raise ValueError(f"an event of {len(raw)} bytes fits no message: {EVENT_BYTES} at most")
    brackets = raw.count(b"{") + raw.count(b"[")
    if given or brackets > NESTING:
        _check(raw)
    if not plain:
        try:
            _type_decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise ValueError(f"an event is an object with a string `type`: {error}") from None
    return Entry(raw, at_ms, brackets)


def _check(raw: bytes) -> None:
    from carserver.protocol.codec import parse  # noqa: PLC0415 - orjson, which most programs never need here
    from carserver.protocol.errors import RpcError  # noqa: PLC0415 - likewise

    try:
        parse(raw, NESTING, BRACKETS)
    except RpcError as error:
        raise ValueError(f"an event that no daemon takes: {error.message}") from None


class Buffer:
    """See above. `held` and `held_bytes` are what is not acknowledged, `total` is how many events were ever taken in.

    Args:
        events: the bound of `held`.
        size: the bound of `held_bytes`, or one larger event.
    """

    def __init__(self, events: int, size: int) -> None:
        self.events = events
        self.size = size
        self.held = 0
        self.held_bytes = 0
        self.total = 0
        self._waiting: deque[Entry] = deque()
        self._text: list[bytes] = []  # pieces that will be one event, the newest
        self._text_bytes = 0
        self._text_at_ms = 0
        self._changes = 0  # how often there came to be room
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # waited for by threads alone

    @property
    def waiting(self) -> int:
        """How many events `take` has to give."""
        return len(self._waiting) + bool(self._text)

    def put(self, entries: Sequence[Entry], *, whole: bool, beyond: bool = False) -> int:
        """Takes in events, in their order; how many.

        Args:
            entries: the events.
            whole: all or none.
            beyond: whatever the bounds say.
        """
        with self._lock:
            fitting = len(entries) if beyond else self._fitting(entries)
            if fitting == 0 or (whole and fitting < len(entries)):
                return 0
            self._seal()
            for one in entries[:fitting]:
                self._waiting.append(one)
                self.held_bytes += len(one.raw)
            self.held += fitting
            self.total += fitting
            return fitting

    def write(self, piece: bytes, at_ms: int) -> bool:
        """Takes in a piece of text (of `pieces`), which joins the piece before if nothing else came between."""
        with self._lock:
            begins = not self._text or self._text_bytes + len(piece) > TEXT_BYTES
            size = len(piece) + (len(_TEXT_EVENT) if begins else 0)
            if (begins and self.held >= self.events) or (self.held and self.held_bytes + size > self.size):
                return False
            if begins:
                self._seal()
                self._text_at_ms, self._text_bytes = at_ms, 0
                self.held += 1
                self.total += 1
            self._text.append(piece)
            self._text_bytes += len(piece)
            self.held_bytes += size
            return True

    def take(self, events: int, size: int) -> list[Entry]:
        """The oldest events, at most so many and about so many bytes, at least one; none where none wait."""
        taken: list[Entry] = []
        total = brackets = 0
        with self._lock:
            self._seal()
            while self._waiting and len(taken) < events:
                one = self._waiting[0]
                total += len(one.raw)
                brackets += one.brackets
                if taken and (total > size or brackets > BRACKETS):
                    break
                taken.append(self._waiting.popleft())
        return taken

    def release(self, entries: Sequence[Entry]) -> None:
        """What was taken is settled: there is room for others."""
        with self._lock:
            self.held -= len(entries)
            self.held_bytes -= sum(len(one.raw) for one in entries)
            self._changed()

    def wake(self) -> None:
        """Has threads that wait for room look again."""
        with self._lock:
            self._changed()

    @property
    def changes(self) -> int:
        """To be remembered before room is asked for, and handed to `wait`."""
        return self._changes

    def wait(self, changes: int, timeout: float) -> bool:
        """Blocks the calling thread until there may be more room than then; False where `timeout` (seconds) is over."""
        with self._room:
            return self._room.wait_for(lambda: self._changes != changes, timeout)

    def _changed(self) -> None:
        self._changes += 1
        self._room.notify_all()

    def _fitting(self, entries: Sequence[Entry]) -> int:
        held, size = self.held, self.held_bytes
        for place, one in enumerate(entries):
            size += len(one.raw)
            if held >= self.events or (held and size > self.size):
                return place
            held += 1
        return len(entries)

    def _seal(self) -> None:
        """The text that was written so far is an event of its own."""
        if self._text:
            raw = _TEXT_EVENT % b"".join(self._text)
            self.held_bytes += len(raw) - self._text_bytes - len(_TEXT_EVENT)
            self._waiting.append(Entry(raw, self._text_at_ms, 1))
            self._text = []


def pieces(text: str) -> list[bytes]:
    """A text as what `Buffer.write` takes: JSON without the quotes, in pieces of at most TEXT_BYTES.

    Raises:
        UnicodeEncodeError: it has lone surrogates.
    """
    if len(text) <= _TEXT_CHARACTERS:
        return [_encode(text)[1:-1]] if text else []
    return [_encode(text[start : start + _TEXT_CHARACTERS])[1:-1] for start in range(0, len(text), _TEXT_CHARACTERS)]
