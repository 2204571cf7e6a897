"""The live stream of handles: `tools.stream.event` for each chunk, best effort (contract, section 6; seed 000).

One queue per connection, however many handles it follows (`core.backlog`): what is skipped a poll has. Like the hub,
all of this is atomic on the loop.
"""

from collections import deque

from carserver.config import Settings
from carserver.core.backlog import Backlog, Turns
from carserver.core.backlog import Piece as AnyPiece
from carserver.core.counters import Counters
from carserver.core.outbox import Outbox
from carserver.core.ports import CallLater
from carserver.core.principals import Principal
from carserver.protocol.errors import limit_exceeded
from carserver.protocol.toolevents import stream_message

_EVERYONE = ""  # for the host, in place of an owner's name
_BY_HANDLE, _BY_OWNER = 1, 2  # what a chunk is wanted for


class Piece(AnyPiece):
    """`tools.stream.event` of one chunk, which is JSON."""

    __slots__ = ("handle",)

    def __init__(self, handle: str, sequence: int, chunk: bytes) -> None:
        super().__init__(stream_message(handle, chunk, sequence), len(chunk))
        self.handle = handle


class Stream(Backlog[Piece]):
    """One connection's.

    Args:
        outbox: Where its frames go.
        principal: Who follows.
        settings: `stream_events`, `stream_bytes`, `watch_piece_bytes`.
        counters: What is counted.
    """

    __slots__ = ("_counters", "handles", "owner", "takes_all")

    def __init__(self, outbox: Outbox, principal: Principal, settings: Settings, counters: Counters) -> None:
        super().__init__(outbox, settings)
        self.owner = _EVERYONE if principal.role == "host" else principal.name
        self.takes_all = False  # what is its owner's
        self.handles: set[str] = set()  # those that it follows one by one; they go with their last chunk
        self._counters = counters

    def count_sent(self, messages: int) -> None:
        """See `core.backlog.Backlog`."""
        self._counters.stream_events += messages

    def count_skip(self) -> None:
        """See `core.backlog.Backlog`."""
        self._counters.stream_skips += 1

    def forget(self, handle: str | None) -> None:
        """What waits is not wanted any more for this handle, or (None) for its owner; it goes if that was all."""
        queue, self._queue, self._bytes = self._queue, deque(), 0
        for piece, wanted_for in queue:
            one = wanted_for & _BY_HANDLE if piece.handle != handle else 0
            every = wanted_for & _BY_OWNER if handle is not None else 0
            if one or every:
                self._queue.append((piece, one | every))
                self._bytes += piece.size


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
        self._settings = settings
        self._counters = counters
        self._turns = Turns(call_later)
        self._streams: set[Stream] = set()
        self._of_handle: dict[str, Audience] = {}
        self._of_owner: dict[str, Audience] = {}

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
            stream.offer(piece, (stream in by_handle) * _BY_HANDLE | (stream in by_owner) * _BY_OWNER)
        self._turns.fed(chosen)


def _answered(audience: Audience) -> dict[Stream, None]:
    return {stream: None for stream, answered in audience.items() if answered}
