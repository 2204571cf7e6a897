"""A loop, a clock and a log of the test's own, for what records handles: nothing moves before it is told to."""

import heapq
import itertools
import json
from collections.abc import Callable, Coroutine, Generator
from typing import Any, NamedTuple

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Command, RecordAside
from carserver.core.counters import Counters
from carserver.core.edits import Edit
from carserver.core.handleedits import Close
from carserver.core.principals import HOST
from carserver.core.runs import Event
from carserver.core.toolrecord import Recorders

Work = Coroutine[Any, Any, None]


class Ask:
    """Something that storage was given, until it answers."""

    def __init__(self, change: Command | Edit, asked_s: float) -> None:
        self.change = change
        self.asked_s = asked_s
        self.asker: Work | None = None
        self.error: Exception | None = None

    def __await__(self) -> Generator["Ask", None, None]:
        yield self
        if self.error is not None:
            raise self.error

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it would record."""
        assert isinstance(self.change, RecordAside | Close)
        return [_read(event) for event in self.change.events]


def _read(event: Event) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(event.raw)
    assert event.type == read["type"]
    assert event.text is None
    return read


class Recorded(NamedTuple):
    """An event in the log; `asked_s` is when it was submitted."""

    event: dict[str, Any]
    asked_s: float


class Timer:
    """One that nobody cancels."""

    def cancel(self) -> None:
        raise AssertionError("recorders let their timers come")


class World:
    """Implements `core.runstore.Clock` and `core.toolrecord.RecordLog`."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.s = 100.0
        self.asks: list[Ask] = []
        self.log: list[Recorded] = []
        self.closed: list[str] = []
        self.deleted = False  # the run
        self.counters = Counters()
        self.recorders = Recorders(self, self, settings or Settings(), self.counters)
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self._ready: list[Work] = []
        self._numbers = itertools.count()

    # Clock.

    def now_ms(self) -> int:
        return round(self.s * 1000)

    def monotonic(self) -> float:
        return self.s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Timer":
        heapq.heappush(self.timers, (self.s + delay_s, next(self._numbers), callback))
        return Timer()

    def spawn(self, work: Work) -> None:
        self._ready.append(work)

    # RecordLog.

    async def submit(self, command: Command, by: Attendant | None, *, patient: bool = False) -> Any:
        assert isinstance(command, RecordAside)
        assert command.principal is HOST
        assert by is None
        assert patient
        await self._ask(command)

    async def edit(self, edit: Edit, *, patient: bool = False) -> Any:
        assert isinstance(edit, Close)
        assert patient
        await self._ask(edit)

    async def _ask(self, change: Command | Edit) -> None:
        ask = Ask(change, self.s)
        self.asks.append(ask)
        await ask

    # What the test does.

    def turn(self) -> None:
        """What was spawned goes on up to its wait."""
        ready, self._ready = self._ready, []
        for work in ready:
            self._go_on(work)

    def _go_on(self, work: Work) -> None:
        try:
            ask = work.send(None)
        except StopIteration:
            return
        ask.asker = work

    def answer(self, error: Exception | None = None) -> Ask:
        """Storage answers the oldest, and a turn of the loop follows."""
        ask = self.asks.pop(0)
        ask.error = error
        if error is None:
            self._apply(ask)
        assert ask.asker
        self._go_on(ask.asker)
        self.turn()
        return ask

    def _apply(self, ask: Ask) -> None:
        if isinstance(ask.change, Close):
            assert ask.change.handle not in self.closed
            self.closed.append(ask.change.handle)
        if not self.deleted:
            self.log += [Recorded(event, ask.asked_s) for event in ask.events]

    def passes(self, seconds: float) -> None:
        """Time, with the timers and turns that fall into it."""
        self.turn()
        until = self.s + seconds
        while self.timers and self.timers[0][0] <= until:
            self.s, _, callback = heapq.heappop(self.timers)
            callback()
            self.turn()
        self.s = until

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits for storage, or waits for its time."""
        return not (self.asks or self.timers or self._ready)

    @property
    def text(self) -> str:
        """The text that the log has."""
        return "".join(recorded.event.get("delta", "") for recorded in self.log)
