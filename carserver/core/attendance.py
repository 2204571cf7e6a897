"""Who attends which run, and which live runs nobody attends any more: those are interrupted after the grace.

Contract, section 7, Attendance. Time and timers come in from outside; a run's grace begins when its last attendant
leaves, or when it was found live at the start of the daemon.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from carserver.config import Settings
from carserver.core.cache import SizedCache
from carserver.core.outbox import Outbox
from carserver.core.runs import Head, LiveRun

OWNER_GONE = "owner gone"


class Attendant(Protocol):
    """A connection that may attend runs: it is told when one of them is cancelled."""

    @property
    def client_id(self) -> str:
        """Its name."""
        ...

    @property
    def outbox(self) -> Outbox:
        """Its frames."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        ...


class _Run:
    """A live run: its last known revision, who attends it, and what its interruption would be called."""

    __slots__ = ("attendants", "reason", "revision", "stamp")

    def __init__(self, revision: int, reason: str) -> None:
        self.revision = revision
        self.reason = reason
        self.attendants: set[Attendant] = set()
        self.stamp = 0  # of the grace that runs now; an older one in the queue is void


class Attendance:
    """The live runs and their attendants.

    Args:
        settings: `grace_s`, `interrupts_at_once`, `interrupts_pause_s`.
        now: A monotonic clock, seconds.
        call_later: Calls back after so many seconds.
        interrupt: Called with run id, revision, reason.
    """

    def __init__(
        self,
        settings: Settings,
        now: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        interrupt: Callable[[str, int, str], None],
    ) -> None:
        self._grace_s = settings.grace_s
        self._at_once = settings.interrupts_at_once
        self._pause_s = settings.interrupts_pause_s
        self._now = now
        self._call_later = call_later
        self._interrupt = interrupt
        self._runs: dict[str, _Run] = {}
        self._arriving: Counter[str] = Counter()
        self._attended: dict[Attendant, set[str]] = {}
        self._graces: deque[tuple[float, str, int]] = deque()
        self._timer_set = False
        self._stamp = 0
        self._last: SizedCache[str, str] = SizedCache(settings.topics, settings.topics_bytes)

    def attended_runs(self) -> int:
        """How many live runs somebody attends."""
        return sum(1 for run in self._runs.values() if run.attendants)

    def attendants(self, run_id: str) -> list[Attendant]:
        """Who attends a live run."""
        run = self._runs.get(run_id)
        return list(run.attendants) if run else []

    def found(self, runs: Iterable[LiveRun], reason: str) -> None:
        """Runs that were live when the daemon started."""
        for live in runs:
            if live.run_id not in self._runs:
                self._runs[live.run_id] = run = _Run(live.revision, reason)
                self._begin_grace(live.run_id, run)

    def arriving(self, run_id: str) -> None:
        """Somebody is about to attend a run: its change is on its way to storage. It is not interrupted meanwhile."""
        self._arriving[run_id] += 1

    def arrived(self, run_id: str) -> None:
        """That change was made, or refused."""
        self._arriving[run_id] -= 1
        if not self._arriving[run_id]:
            del self._arriving[run_id]

    def changed(self, head: Head, by: Attendant | None) -> None:
        """A run was created or changed; `by` attends it from now on, if it is somebody."""
        run_id = head.run.id
        if not head.live:
            self._forget(run_id)
            return
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = _Run(head.revision, OWNER_GONE)
            self._begin_grace(run_id, run)
        run.revision = head.revision
        if by is not None:
            self.attend(run_id, by)
        if not run.attendants:
            self._begin_grace(run_id, run)

    def is_live(self, run_id: str) -> bool:
        """Whether there is such a run, and it is not over."""
        return run_id in self._runs

    def attend(self, run_id: str, by: Attendant) -> None:
        """A connection of the run's owner attends it from now on, if it is live."""
        run = self._runs.get(run_id)
        if run is None or by.closed:
            return
        if by not in run.attendants:
            run.attendants.add(by)
            self._last.put(run_id, by.client_id, len(by.client_id))
        run.reason = OWNER_GONE
        run.stamp = 0
        self._attended.setdefault(by, set()).add(run_id)

    def last(self, run_id: str) -> str | None:
        """The name of the connection that came to attend the run last, also once it is over; None if not known."""
        return self._last.get(run_id)

    def attend_alone(self, run_id: str, by: Attendant) -> None:
        """A connection of the run's owner attends it from now on, if it is live, and nobody else any more."""
        run = self._runs.get(run_id)
        if run is None:
            return
        for attendant in run.attendants:
            self._attends_no_more(attendant, run_id)
        run.attendants.clear()
        self.attend(run_id, by)
        if not run.attendants:
            self._begin_grace(run_id, run)

    def leave(self, attendant: Attendant) -> None:
        """A connection ended: it attends nothing any more."""
        for run_id in self._attended.pop(attendant, ()):
            run = self._runs[run_id]
            run.attendants.discard(attendant)
            if not run.attendants:
                self._begin_grace(run_id, run)

    def again(self, run_id: str) -> None:
        """An interruption could not be stored: the run gets another grace."""
        run = self._runs.get(run_id)
        if run is not None and not run.attendants:
            self._begin_grace(run_id, run)

    def _forget(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        for attendant in run.attendants if run else ():
            self._attends_no_more(attendant, run_id)

    def _attends_no_more(self, attendant: Attendant, run_id: str) -> None:
        attended = self._attended[attendant]
        attended.discard(run_id)
        if not attended:
            del self._attended[attendant]

    def _begin_grace(self, run_id: str, run: _Run) -> None:
        self._stamp += 1
        run.stamp = self._stamp
        self._graces.append((self._now() + self._grace_s, run_id, run.stamp))
        self._set_timer()

    def _set_timer(self, at_least_s: float = 0.0) -> None:
        if self._graces and not self._timer_set:
            self._timer_set = True
            self._call_later(max(self._graces[0][0] - self._now(), at_least_s), self._due)

    def _due(self) -> None:
        self._timer_set = False
        now = self._now()
        interrupted = 0
        while self._graces and self._graces[0][0] <= now and interrupted < self._at_once:
            _, run_id, stamp = self._graces.popleft()
            run = self._runs.get(run_id)
            if run is None or run.stamp != stamp:
                continue
            if run_id in self._arriving:
                self._begin_grace(run_id, run)
                continue
            run.stamp = 0
            interrupted += 1
            self._interrupt(run_id, run.revision, run.reason)
        self._set_timer(self._pause_s if interrupted == self._at_once else 0.0)
