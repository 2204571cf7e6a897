"""The bounded queue of frames to one peer. It knows no socket: whoever drains it is woken when there is more.

Replies always enter, and the front end stops reading a peer whose outbox is full; frames of the live trace enter while
there is room (`subscription`). The same bytes may stand in many outboxes: nothing here copies a frame.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

Framing = Callable[[bytes], bytes]
"""Makes a transport's frame of one JSON text: a WebSocket frame, or a line."""


class Sender(Protocol):
    """Something that wants to know when what it put into an outbox has left it."""

    def left(self, events: int, size: int) -> None:
        """`events` of it, `size` bytes, have been taken."""
        ...


class Outbox:
    """The frames that wait for one peer, first in first out.

    Args:
        framing: The transport's.
        limit: Bytes; with one larger frame as the exception that keeps things moving.
        wake: Called when there is something to take.
    """

    __slots__ = ("_low", "_queue", "_relief", "_wake", "framing", "limit", "reserved", "sealed", "size")

    def __init__(self, framing: Framing, limit: int, wake: Callable[[], None]) -> None:
        self.framing = framing
        self.limit = limit
        self.size = 0
        self.reserved = 0  # for the large answers of requests under way
        self.sealed = False
        self._low = limit // 4  # below it a page of a log fits, and reading goes on
        self._relief: list[Callable[[], None]] = []
        self._queue: deque[tuple[bytes, Sender | None, int]] = deque()
        self._wake = wake

    @property
    def full(self) -> bool:
        """Whether the peer's requests must wait."""
        return self.size + self.reserved >= self.limit

    @property
    def low(self) -> bool:
        """Whether a page of a log fits comfortably; never, where nothing enters any more."""
        return self.size <= self._low and not self.sealed

    def has_room(self, size: int) -> bool:
        """Whether a frame that may wait fits now."""
        return not self._queue or self.size + size <= self.limit

    def send(self, payload: bytes) -> None:
        """A message that must go out; it is dropped only where the connection is ending anyway."""
        if not self.sealed:
            frame = self.framing(payload)
            self._queue.append((frame, None, 0))
            self.size += len(frame)
            self._wake()

    def put(self, frames: bytes, sender: Sender | None = None, events: int = 0) -> None:
        """Frames that are ready for the transport."""
        if self.sealed:
            return
        self._queue.append((frames, sender, events))
        self.size += len(frames)
        self._wake()

    def seal(self, last: bytes = b"") -> None:
        """Nothing enters any more; `last` is the final frame."""
        if not self.sealed:
            self.put(last)
            self.sealed = True

    def discard(self) -> None:
        """The transport is gone."""
        self.sealed = True
        self._queue.clear()
        self._relief.clear()
        self.size = 0

    def take(self, at_most: int) -> bytes:
        """The next frames, joined: about `at_most` bytes of them, at least one; empty if none wait."""
        queue = self._queue
        if len(queue) == 1:
            joined, sender, events = queue.popleft()
            if sender is not None:
                sender.left(events, len(joined))
        else:
            joined = self._take_several(at_most)
        self.size -= len(joined)
        if self._relief and self.size <= self._low:
            waiting, self._relief = self._relief, []
            for callback in waiting:
                callback()
        return joined

    def _take_several(self, at_most: int) -> bytes:
        queue = self._queue
        taken: list[bytes] = []
        size = 0
        while queue and size < at_most:
            frames, sender, events = queue.popleft()
            taken.append(frames)
            size += len(frames)
            if sender is not None:
                sender.left(events, len(frames))
        return b"".join(taken)

    def when_low(self, callback: Callable[[], None]) -> None:
        """Calls back, once, when something was taken and the outbox is low."""
        self._relief.append(callback)
