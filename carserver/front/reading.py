"""Whether a connection reads from its socket, and if it does not, what it waits for."""

import asyncio
from collections.abc import Callable

from carserver.core.counters import Counters
from carserver.core.outbox import Outbox


class Reading:
    """Pauses reading for two reasons: the peer has asked for as much as may be under way, or others have their turn.

    Args:
        transport: What is read.
        outbox: Where answers go; while it is full, nothing more is asked of it.
        must_wait: Whether the peer has asked for as much as may be under way.
        go_on: Called when reading goes on; what was read before is to be looked at first.
        counters: `reading_pauses` counts the waits, not the turns.
    """

    __slots__ = (
        "_counters",
        "_due",
        "_go_on",
        "_loop",
        "_must_wait",
        "_outbox",
        "_told_when_low",
        "_transport",
        "_waits",
        "paused",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        outbox: Outbox,
        must_wait: Callable[[], bool],
        go_on: Callable[[], None],
        counters: Counters,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._outbox = outbox
        self._must_wait = must_wait
        self._go_on = go_on
        self._counters = counters
        self.paused = False
        self._waits = False  # paused until there is room, not for a turn
        self._told_when_low = False  # the outbox will call
        self._due = False  # it is looked at in the next tick

    def give_turn(self) -> None:
        """The others first: libuv would read up to 8 MiB of one socket before it looks at another."""
        self._stop()
        self._look_soon()

    def wait(self) -> None:
        """The peer has to wait for what it has asked already."""
        self._stop()
        if not self._waits:
            self._waits = True
            self._counters.reading_pauses += 1
        if self._outbox.size and not self._told_when_low:  # it may have filled since the wait began
            self._told_when_low = True
            self._outbox.when_low(self._outbox_is_low)

    def changed(self) -> None:
        """A request was answered, or the connection closes: perhaps the peer need not wait any more."""
        if self.paused:
            self._look_soon()

    def _outbox_is_low(self) -> None:
        # Waiting goes on where requests are still under way; each of them tells when it is answered.
        self._told_when_low = False
        self.changed()

    def _stop(self) -> None:
        if not self.paused:
            self.paused = True
            self._transport.pause_reading()

    def _look_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._due = False
        if not self.paused or self._transport.is_closing():
            return
        if self._must_wait():
            self.wait()
            return
        self.paused = self._waits = False
        self._transport.resume_reading()
        self._go_on()
