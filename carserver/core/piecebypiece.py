"""What waits for one connection and leaves piece by piece, in turns with all else that it is sent."""

from abc import ABC, abstractmethod

from carserver.core.outbox import Outbox


class PieceByPiece(ABC):
    """One connection's.

    At most one piece of it is in the outbox, and the next enters when that is low: so it takes turns with the live
    traces of the same connection, and what a peer does not read waits in a queue of its own.

    Args:
        outbox: Where its frames go.
    """

    __slots__ = ("_outbox", "_under_way", "closed")

    def __init__(self, outbox: Outbox) -> None:
        self.closed = False
        self._outbox = outbox
        self._under_way = False  # a piece is in the outbox, or the outbox will say when it is low

    @abstractmethod
    def has_more(self) -> bool:
        """Whether anything waits."""

    @abstractmethod
    def take_piece(self) -> tuple[bytes, int]:
        """The next piece, framed, and how many messages it counts as."""

    @abstractmethod
    def count_sent(self, messages: int) -> None:
        """So many went to the socket."""

    def move(self) -> None:
        """Moves a piece of what waits to the outbox, now if that is low, else when it is."""
        if self._under_way or self.closed or not self.has_more():
            return
        self._under_way = True
        if self._outbox.low:
            piece, messages = self.take_piece()
            self._outbox.put(piece, self, messages)
        else:
            self._outbox.when_low(self._there_is_room)

    def left(self, events: int, size: int) -> None:
        """The outbox gave the piece to the socket (`core.outbox.Sender`)."""
        self.count_sent(events)
        # Not at once: whoever waits for a low outbox already is first.
        self._outbox.when_low(self._there_is_room)

    def _there_is_room(self) -> None:
        self._under_way = False
        self.move()
