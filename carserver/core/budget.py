"""Lets in what may take so many bytes at once; the others wait their turn. No I/O."""

from collections import deque
from collections.abc import Callable

from carserver.core.handles import Signal
from carserver.core.ports import CallLater


class Budget:
    """So many bytes at once, or one of more; first come, first served.

    What is given back is there from the next turn of the loop on. What bytes are taken for takes time, too: so no turn
    has more of it than the budget allows.

    Args:
        maximum: Bytes.
        call_later: A timer.
        new_signal: Something to wait for.
    """

    def __init__(self, maximum: int, call_later: CallLater, new_signal: Callable[[], Signal]) -> None:
        self.taken = 0
        self._maximum = maximum
        self._call_later = call_later
        self._new_signal = new_signal
        self._waiting: deque[tuple[int, Signal]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def enter(self, size: int) -> None:
        """Takes `size` bytes, once there are that many; `leave` gives them back."""
        if not self._waiting and self._is_room(size):
            self.taken += size
            return
        signal = self._new_signal()
        self._waiting.append((size, signal))
        await signal.wait(None)

    def leave(self, size: int) -> None:
        """Gives back what was taken; in the next turn of the loop whoever there is room for comes in."""
        self._call_later(0.0, lambda: self._left(size))

    def _left(self, size: int) -> None:
        self.taken -= size
        while self._waiting and self._is_room(self._waiting[0][0]):
            size, signal = self._waiting.popleft()
            self.taken += size
            signal.set()

    def _is_room(self, size: int) -> bool:
        return not self.taken or self.taken + size <= self._maximum
