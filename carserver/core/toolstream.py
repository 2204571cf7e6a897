"""The live stream of handles: `tools.stream.event` for each chunk, best effort (contract, section 6; seed 000).

One queue per connection, however many handles it follows. Where it grows over its bounds the oldest go: the gap in the
sequence shows that to the peer, and a poll has what is missing. What was published in one turn of the loop leaves
together, and a chunk is framed once for all who get it. Like the hub, all of this is atomic on the loop.
"""

from collections import deque

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outbox import Framing, Outbox
from carserver.core.ports import CallLater
from carserver.core.principals import Principal
from carserver.protocol.errors import limit_exceeded
from carserver.protocol.toolevents import stream_message

_EVERYONE = ""  # for the host, in place of an owner's name


class Piece:
    """One chunk, as JSON, framed once for all who get it."""

    __slots__ = ("_chunk", "_framed", "_sequence", "handle", "size")

    def __init__(self, handle: str, sequence: int, chunk: bytes) -> None:
        self.handle = handle
        self.size = len(chunk)
        self._sequence = sequence
        self._chunk = chunk
        self._framed: dict[Framing, bytes] = {}

    def framed(self, framing: Framing) -> bytes:
        """`tools.stream.event`, as `framing` frames it."""
        frame = self._framed.get(framing)
        if frame is None:
            frame = self._framed[framing] = framing(stream_message(self.handle, self._chunk, self._sequence))
        return frame


class Stream:
    """One connection's.

    At most one piece of it is in the outbox, and the next enters when that is low: so it takes turns with the live
    traces of the same connection, and a peer that does not read costs a bounded queue.

    Args:
        outbox: Where its frames go.
        principal: Who follows.
        settings: `stream_events`, `stream_bytes`, `watch_piece_bytes`.
        counters: What is counted.
    """

    __slots__ = (
        "_bytes",
        "_counters",
        "_maximum",
        "_maximum_bytes",
        "_outbox",
        "_piece_bytes",
        "_queue",
        "_under_way",
        "closed",
        "handles",
        "owner",
        "takes_all",
    )

    def __init__(self, outbox: Outbox, principal: Principal, settings: Settings, counters: Counters) -> None:
        self.closed = False
        self.owner = _EVERYONE if principal.role == "host" else principal.name
        self.takes_all = False  # what is its owner's
        self.handles: set[str] = set()  # those that it follows one by one; they go with their last chunk
        self._outbox = outbox
        self._maximum = settings.stream_events
        self._maximum_bytes = settings.stream_bytes
        self._piece_bytes = settings.watch_piece_bytes
        self._counters = counters
        self._queue: deque[tuple[Piece, bool, bool]] = deque()
        self._bytes = 0  # of the chunks in the queue
        self._under_way = False  # a piece is in the outbox, or the outbox will say when it is low

    @property
    def waiting(self) -> int:
        """How many chunks are in the queue."""
        return len(self._queue)

    def offer(self, piece: Piece, *, by_handle: bool, by_owner: bool) -> None:
        """One more chunk, and what it is wanted for; the oldest are skipped where there is no room."""
        self._queue.append((piece, by_handle, by_owner))
        self._bytes += piece.size
        if self._is_over():
            self.move()  # a burst of one turn of the loop: the outbox may have room
        while self._is_over():
            self._bytes -= self._queue.popleft()[0].size
            self._counters.stream_skips += 1

    def _is_over(self) -> bool:
        waiting = len(self._queue)
        return waiting > self._maximum or (self._bytes > self._maximum_bytes and waiting > 1)

    def forget(self, handle: str | None) -> None:
        """What waits is not wanted any more for this handle, or (None) for its owner; it goes if that was all."""
        queue, self._queue, self._bytes = self._queue, deque(), 0
        for piece, by_handle, by_owner in queue:
            one = by_handle and piece.handle != handle
            every = by_owner and handle is not None
            if one or every:
                self._queue.append((piece, one, every))
                self._bytes += piece.size

    def move(self) -> None:
        """Moves a piece of what waits to the outbox, now if that is low, else when it is."""
        if self._under_way or self.closed or not self._queue:
            return
        self._under_way = True
        if self._outbox.low:
            self._put()
        else:
            self._outbox.when_low(self._there_is_room)

    def _put(self) -> None:
        framing = self._outbox.framing
        frames: list[bytes] = []
        size = 0
        while self._queue and size < self._piece_bytes:
            piece, _, _ = self._queue.popleft()
            self._bytes -= piece.size
            frame = piece.framed(framing)
            frames.append(frame)
            size += len(frame)
        self._outbox.put(b"".join(frames), self, len(frames))

    def left(self, events: int, size: int) -> None:
        """The outbox gave the piece to the socket (`core.outbox.Sender`)."""
        self._counters.stream_events += events
        # Not at once: whoever waits for a low outbox already is first.
        self._outbox.when_low(self._there_is_room)

    def _there_is_room(self) -> None:
        self._under_way = False
        self.move()

    def close(self) -> None:
        """Nothing more enters the outbox."""
        self.closed = True
        self._queue.clear()


Audience = dict[Stream, bool]
"""Who asked, and whether that is answered already: nothing is sent before."""


class ToolStreams:
    """All streams.

    Args:
        call_later: A timer.
        settings: Their bounds; `subscriptions` handles that one of them follows.
        counters: What is counted.
    """

    def __init__(self, call_later: CallLater, settings: Settings, counters: Counters) -> None:
        self._call_later = call_later
        self._settings = settings
        self._counters = counters
        self._streams: set[Stream] = set()
        self._of_handle: dict[str, Audience] = {}
        self._of_owner: dict[str, Audience] = {}
        self._fed: dict[Stream, None] = {}  # in this turn of the loop

    def __len__(self) -> int:
        """How many there are."""
        return len(self._streams)

    @property
    def waiting(self) -> int:
        """Chunks that wait for their peers, all together."""
        return sum(stream.waiting for stream in self._streams)

    def open(self, outbox: Outbox, principal: Principal) -> Stream:
        """A connection's stream, which follows nothing yet."""
        stream = Stream(outbox, principal, self._settings, self._counters)
        self._streams.add(stream)
        return stream

    def drop(self, stream: Stream) -> None:
        """Ends a stream; the second time nothing happens."""
        stream.close()
        self._streams.discard(stream)
        self.unfollow(stream, None)
        for handle in list(stream.handles):
            self.unfollow(stream, handle)

    def follow(self, stream: Stream, handle: str | None) -> bool:
        """Takes note of what a stream is to follow once `activate` says that this is answered; None: all of its owner.

        False where it follows that already.

        Raises:
            RpcError: limit_exceeded.
        """
        if handle is None:
            is_new = not stream.takes_all
            stream.takes_all = True
        else:
            is_new = handle not in stream.handles
            if is_new and len(stream.handles) >= self._settings.subscriptions:
                raise limit_exceeded("subscriptions", len(stream.handles) + 1, self._settings.subscriptions, "handle")
            stream.handles.add(handle)
        if is_new:
            self._audiences(handle).setdefault(self._key(stream, handle), {})[stream] = False
        return is_new

    def activate(self, stream: Stream, handle: str | None) -> None:
        """The reply is queued: every chunk from now on."""
        audience = self._audiences(handle).get(self._key(stream, handle), {})
        if stream in audience:
            audience[stream] = True

    def unfollow(self, stream: Stream, handle: str | None) -> bool:
        """Whether there was something to end; nothing that waits of it is sent any more."""
        stream.forget(handle)
        if handle is None:
            stream.takes_all = False
        else:
            stream.handles.discard(handle)
        audiences, key = self._audiences(handle), self._key(stream, handle)
        audience = audiences.get(key, {})
        if audience.pop(stream, None) is None:
            return False
        if not audience:
            del audiences[key]
        return True

    def _audiences(self, handle: str | None) -> dict[str, Audience]:
        return self._of_owner if handle is None else self._of_handle

    @staticmethod
    def _key(stream: Stream, handle: str | None) -> str:
        return stream.owner if handle is None else handle

    def publish(self, handle: str, owner: str, sequence: int, chunk: bytes, *, last: bool) -> None:
        """The next chunk of a handle, as JSON; after the last one nobody follows it any more."""
        if not self._of_handle and not self._of_owner:
            return
        asked = self._of_handle.pop(handle, {}) if last else self._of_handle.get(handle, {})
        if last:
            for stream in asked:
                stream.handles.discard(handle)
        by_handle = _answered(asked)
        by_owner = _answered(self._of_owner.get(owner, {})) | _answered(self._of_owner.get(_EVERYONE, {}))
        chosen = by_handle | by_owner
        if not chosen:
            return
        piece = Piece(handle, sequence, chunk)
        for stream in chosen:
            stream.offer(piece, by_handle=stream in by_handle, by_owner=stream in by_owner)
        if not self._fed:
            self._call_later(0.0, self._move)  # once the loop has taken all that is there: it leaves in one piece
        self._fed |= chosen

    def _move(self) -> None:
        fed, self._fed = self._fed, {}
        for stream in fed:
            stream.move()


def _answered(audience: Audience) -> dict[Stream, None]:
    return {stream: None for stream, answered in audience.items() if answered}
