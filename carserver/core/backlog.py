"""What waits for one connection of messages that may be skipped: best effort, a bounded queue (contract, section 6).

Where it grows over its bounds the oldest go: a gap in their numbers shows that to the peer, and what has them is asked
for them. What was offered in one turn of the loop leaves together, and a message is framed once for all who get it.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from carserver.config import Settings
from carserver.core.outbox import Framing, Outbox
from carserver.core.piecebypiece import PieceByPiece
from carserver.core.ports import CallLater


class Piece:
    """One message, framed once for all who get it; `size` is what counts of it against the bounds."""

    __slots__ = ("_framed", "_message", "size")

    def __init__(self, message: bytes, size: int) -> None:
        self.size = size
        self._message = message
        self._framed: dict[Framing, bytes] = {}

    def framed(self, framing: Framing) -> bytes:
        """The message, as `framing` frames it."""
        frame = self._framed.get(framing)
        if frame is None:
            frame = self._framed[framing] = framing(self._message)
        return frame


P = TypeVar("P", bound=Piece)


class Backlog(PieceByPiece, Generic[P]):
    """One connection's. A peer that does not read costs a bounded queue.

    Args:
        outbox: Where its frames go.
        settings: `stream_events`, `stream_bytes`, `watch_piece_bytes`.
    """

    __slots__ = ("_bytes", "_maximum", "_maximum_bytes", "_piece_bytes", "_queue")

    def __init__(self, outbox: Outbox, settings: Settings) -> None:
        super().__init__(outbox)
        self._maximum = settings.stream_events
        self._maximum_bytes = settings.stream_bytes
        self._piece_bytes = settings.watch_piece_bytes
        self._queue: deque[tuple[P, int]] = deque()  # and what each is wanted for, in flags of whoever offers
        self._bytes = 0  # of the messages in the queue

    @property
    def waiting(self) -> int:
        """How many messages are in the queue."""
        return len(self._queue)

    @abstractmethod
    def count_skip(self) -> None:
        """One was left out."""

    def offer(self, piece: P, wanted_for: int = 1) -> None:
        """One more message; the oldest are skipped where there is no room."""
        self._queue.append((piece, wanted_for))
        self._bytes += piece.size
        if self._is_over():
            self.move()  # a burst of one turn of the loop: the outbox may have room
        while self._is_over():
            self._bytes -= self._queue.popleft()[0].size
            self.count_skip()

    def _is_over(self) -> bool:
        waiting = len(self._queue)
        return waiting > self._maximum or (self._bytes > self._maximum_bytes and waiting > 1)

    def has_more(self) -> bool:
        """See `core.piecebypiece`."""
        return bool(self._queue)

    def take_piece(self) -> tuple[bytes, int]:
        """See `core.piecebypiece`."""
        framing = self._outbox.framing
        frames: list[bytes] = []
        size = 0
        while self._queue and size < self._piece_bytes:
            piece, _ = self._queue.popleft()
            self._bytes -= piece.size
            frame = piece.framed(framing)
            frames.append(frame)
            size += len(frame)
        return b"".join(frames), len(frames)

    def close(self) -> None:
        """Nothing more enters the outbox."""
        self.closed = True
        self._queue.clear()


class Turns:
    """Moves what was offered, once the loop has taken all that is there: it leaves in one piece.

    Args:
        call_later: A timer.
    """

    def __init__(self, call_later: CallLater) -> None:
        self._call_later = call_later
        self._fed: dict[Backlog[Piece], None] = {}  # in this turn of the loop

    def fed(self, backlogs: Iterable["Backlog[P]"]) -> None:
        """Something was offered to these."""
        before = len(self._fed)
        self._fed.update(dict.fromkeys(backlogs))  # type: ignore[arg-type]  # they are moved, whatever waits in them
        if self._fed and not before:
            self._call_later(0.0, self._move)

    def _move(self) -> None:
        fed, self._fed = self._fed, {}
        for backlog in fed:
            backlog.move()
