"""A run as the loop knows it, and one connection's place in its log: a number, `next`, and a mode.

Rules 1 and 4 of the live trace (contract, section 7).
"""

from collections.abc import Callable
from enum import Enum, auto

from carserver.core.counters import Counters
from carserver.core.outbox import Framing, Outbox
from carserver.core.runs import Head
from carserver.protocol.codec import encode
from carserver.protocol.trace import TraceFrames


class Mode(Enum):
    """Where a subscription's next event comes from."""

    PENDING = auto()  # its reply is not queued yet
    CATCHING_UP = auto()  # from the log
    LIVE = auto()  # from the commit
    CLOSED = auto()


class Piece:
    """Frames of consecutive events, `first` to before `end`, framed once for all who are sent them."""

    __slots__ = ("_framed", "_payloads", "end", "first")

    def __init__(self, first: int, payloads: list[bytes]) -> None:
        self.first = first
        self.end = first + len(payloads)
        self._payloads = payloads
        self._framed: dict[Framing, bytes] = {}

    def framed(self, framing: Framing) -> bytes:
        """All of them, as `framing` frames them."""
        frames = self._framed.get(framing)
        if frames is None:
            frames = self._framed[framing] = b"".join(map(framing, self._payloads))
        return frames


class Topic:
    """One run as the loop knows it: its head, and who watches it."""

    __slots__ = ("_ended", "_frames", "_head", "_snapshot", "closed", "pins", "run_id", "subscriptions", "waiting")

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.pins = 0  # subscriptions, and reads under way
        self.closed = ""  # why, where the run is no more; another one of the same id has another topic
        self.subscriptions: dict[Subscription, None] = {}
        self.waiting: dict[int, list[Subscription]] = {}  # by cursor: who needs the page that begins there
        self._head: Head | None = None
        self._snapshot: bytes | None = None
        self._frames: TraceFrames | None = None
        self._ended: Piece | None = None

    @property
    def head(self) -> Head | None:
        """None until it was read; and for a run that does not exist."""
        return self._head

    @property
    def known(self) -> Head:
        """The head of a run that is known to exist."""
        assert self._head is not None  # noqa: S101 - subscriptions and pages exist only for topics with a head
        return self._head

    @property
    def cursor(self) -> int:
        """How many events are committed."""
        return self.known.cursor

    @property
    def over(self) -> bool:
        """Whether the run has a final status or is interrupted."""
        return not self.known.live

    @property
    def endings(self) -> int:
        """How often the run came to be over."""
        return self.known.endings

    @property
    def snapshot(self) -> bytes:
        """The run as JSON, encoded once per change."""
        if self._snapshot is None:
            self._snapshot = encode(self.known.run)
        return self._snapshot

    @property
    def frames(self) -> TraceFrames:
        """The maker of this run's frames."""
        if self._frames is None:
            self._frames = TraceFrames(self.run_id, self.known.run.agent_id)
        return self._frames

    def update(self, head: Head) -> None:
        """What was read or published: the greater wins."""
        if self._head is None or head.revision > self._head.revision:
            self._head = head
            self._snapshot = None
            self._ended = None

    def started(self) -> bytes:
        """The record that a stream from 0 begins with."""
        return self.frames.started(self.known.run)

    def ended(self) -> Piece:
        """The record of the run being over, framed once for all."""
        if self._ended is None:
            self._ended = Piece(self.cursor, [self.frames.ended(self.known.run, self.known.outcome)])
        return self._ended


class Bounds:
    """How much of one subscription may wait in its outbox: events and bytes, or one piece that is larger."""

    __slots__ = ("bytes", "events")

    def __init__(self, events: int, bytes_: int) -> None:
        self.events = events
        self.bytes = bytes_


class Subscription:
    """A viewer of a run. `want` is called when it needs a page of the log."""

    __slots__ = (
        "_bounds",
        "_counters",
        "_undelivered_bytes",
        "_undelivered_events",
        "_want",
        "endings_seen",
        "mode",
        "next",
        "outbox",
        "started_due",
        "subscribed",
        "topic",
    )

    def __init__(
        self,
        topic: Topic,
        outbox: Outbox,
        cursor: int,
        *,
        bounds: Bounds,
        counters: Counters,
        want: Callable[["Subscription"], None],
    ) -> None:
        self.topic = topic
        self.outbox = outbox
        self.next = cursor
        self.mode = Mode.PENDING
        self.endings_seen = 0
        self.started_due = cursor == 0
        self.subscribed: dict[str, Subscription] = {}  # the connection's, where it stands until it is dropped
        self._bounds = bounds
        self._counters = counters
        self._want = want
        self._undelivered_events = 0
        self._undelivered_bytes = 0

    def offer(self, piece: Piece) -> None:
        """New events. Live, it takes those that come next while there is room; all else it reads from the log later."""
        if self.mode is not Mode.LIVE or piece.end <= self.next:
            return
        outbox = self.outbox
        frames = piece.framed(outbox.framing)
        events = piece.end - piece.first
        if piece.first == self.next and self._has_room(events, len(frames)):
            self._undelivered_events += events
            self._undelivered_bytes += len(frames)
            outbox.put(frames, self, events)
            self.next = piece.end
        else:
            self._fall_behind()

    def offer_ending(self) -> None:
        """The run is over: live and level, it says so. Not level is who waits for what its head was read ahead of."""
        if self.mode is Mode.LIVE and self.next == self.topic.cursor and not self._put_ending():
            self._fall_behind()

    def catch_up(self, piece: Piece) -> bool:
        """A page of the log. False where there is no room for it in the outbox."""
        frames = piece.framed(self.outbox.framing)
        if piece.first != self.next or not self.outbox.has_room(len(frames)):
            return False
        self._put(frames, piece.end - piece.first)
        self.next = piece.end
        return True

    def settle(self) -> bool:
        """Goes live if it is level with its run. False where it needs a page, or room, first."""
        if self.started_due:
            frames = self.outbox.framing(self.topic.started())
            if not self.outbox.has_room(len(frames)):
                return False
            self._put(frames, 0)
            self.started_due = False
        if self.next != self.topic.cursor or not self._put_ending():
            return False
        self.mode = Mode.LIVE
        self._counters.catch_up_rejoins += 1
        return True

    def left(self, events: int, size: int) -> None:
        """The outbox gave `events` of it to the socket."""
        self._undelivered_events -= events
        self._undelivered_bytes -= size
        self._counters.events_delivered += events

    def _put_ending(self) -> bool:
        """The `ended` record, once per ending. False where there is no room for it."""
        topic = self.topic
        if not topic.over or self.endings_seen == topic.endings:
            return True
        frames = topic.ended().framed(self.outbox.framing)
        if not self._has_room(0, len(frames)):
            return False
        self._put(frames, 0)
        self.endings_seen = topic.endings
        return True

    def _has_room(self, events: int, size: int) -> bool:
        mine = self._undelivered_bytes == 0 or (
            self._undelivered_events + events <= self._bounds.events
            and self._undelivered_bytes + size <= self._bounds.bytes
        )
        return mine and self.outbox.has_room(size)

    def _put(self, frames: bytes, events: int) -> None:
        self._undelivered_events += events
        self._undelivered_bytes += len(frames)
        self.outbox.put(frames, self, events)

    def _fall_behind(self) -> None:
        self.mode = Mode.CATCHING_UP
        self._counters.subscription_overflows += 1
        self._want(self)
