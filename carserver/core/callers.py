"""Who waits for a handle, and how long it lives when nobody does (contract, section 6, Lifetime).

A handle lives as long as a connection that invoked it, at the least. After that, and unless its run is live, somebody
of its principal has to invoke it again, by its key, or poll it, once in each grace.
"""

from collections.abc import Callable

from carserver.config import Settings
from carserver.core.attendance import Attendance, Attendant
from carserver.core.counters import Counters
from carserver.core.handles import Handle
from carserver.core.life import Life
from carserver.core.runstore import Clock

ORPHANED = "nobody waits for it: the connection that invoked it has ended"


class Callers:
    """The connections that invoked handles which live.

    Args:
        attendance: Of the runs that handles are part of: who invokes or polls a handle attends its run.
        is_live: Whether a handle has come to be, and has not ended.
        clock: Time, timers.
        settings: `grace_s`.
        counters: What is counted.
    """

    def __init__(
        self,
        attendance: Attendance,
        is_live: Callable[[Life], bool],
        clock: Clock,
        settings: Settings,
        counters: Counters,
    ) -> None:
        self._attendance = attendance
        self._is_live = is_live
        self._clock = clock
        self._grace_s = settings.grace_s
        self._counters = counters
        self._invoked: dict[Attendant, dict[str, Life]] = {}

    def attach(self, life: Life, by: Attendant) -> None:
        """The connection `by` invoked it: it lives as long as that does, at the least."""
        handle = life.handle
        if handle.ended:
            return
        if handle.run_id is not None:
            self._attendance.attend(handle.run_id, by)
        if by.closed:
            self.orphan(life)
            return
        handle.invokers.add(by)
        self._invoked.setdefault(by, {})[handle.id] = life

    def leave(self, by: Attendant) -> None:
        """A connection has ended, or acts as somebody else now."""
        for life in self._invoked.pop(by, {}).values():
            life.handle.invokers.discard(by)
            self.orphan(life)

    def orphan(self, life: Life) -> None:
        """Unless somebody invokes it again, polls it, or its run is live, it has the grace to go."""
        handle = life.handle
        if not handle.invokers and not handle.ended:
            handle.polled_s = max(handle.polled_s, self._clock.monotonic())
            self._look_later(life, self._grace_s)

    def _look_later(self, life: Life, delay_s: float) -> None:
        if not life.handle.has_grace:
            life.handle.has_grace = True
            self._clock.call_later(delay_s, lambda: self._look_at_orphan(life))

    def _look_at_orphan(self, life: Life) -> None:
        handle = life.handle
        handle.has_grace = False
        if handle.invokers or not self._is_live(life):
            return
        now_s = self._clock.monotonic()
        if handle.polling or (handle.run_id is not None and self._attendance.is_live(handle.run_id)):
            handle.polled_s = now_s
        left_s = handle.polled_s + self._grace_s - now_s
        if left_s > 0:
            self._look_later(life, left_s)
        elif life.cancel(ORPHANED):
            self._counters.handles_orphaned += 1

    def polls(self, handle: Handle, by: Attendant) -> None:
        """Its principal asks for it, on the connection `by`."""
        handle.polled_s = self._clock.monotonic()
        if handle.run_id is not None:
            self._attendance.attend(handle.run_id, by)

    def ended(self, life: Life) -> None:
        """It has its last status: nobody waits for more of it."""
        for by in life.handle.invokers:
            invoked = self._invoked[by]
            del invoked[life.handle.id]
            if not invoked:
                del self._invoked[by]
        life.handle.invokers.clear()
