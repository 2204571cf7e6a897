"""What a test needs around a `Hosting`: a feed that remembers, and a clock that is set by hand."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from carserver.core.execution import CLOSED, Call, Execution
from carserver.core.outbox import Outbox
from carserver.protocol.tools import ErrorChunk, GivenChunk, GivenDone


class Timer:
    """Implements `core.ports.Timer`."""

    def __init__(self, at_s: float, callback: Callable[[], None], timers: "list[Timer]") -> None:
        self.at_s = at_s
        self.callback = callback
        self._timers = timers

    def cancel(self) -> None:
        if self in self._timers:
            self._timers.remove(self)


class Clock:
    """Implements `core.runstore.Clock`; nothing passes but by `advance`."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.timers: list[Timer] = []

    def now_ms(self) -> int:
        return round(self.now_s * 1000)

    def monotonic(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.now_s + delay_s, callback, self.timers)
        self.timers.append(timer)
        return timer

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        raise NotImplementedError

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        while due := [timer for timer in self.timers if timer.at_s <= self.now_s]:
            due[0].cancel()
            due[0].callback()


class Feed:
    """Implements `core.execution.Feed`: `said` is all that it was told while its handle ran, `ends` the rest."""

    def __init__(self) -> None:
        self.over = False
        self.said: list[GivenChunk | str] = []
        self.ends: list[str] = []
        self.late = 0  # chunks that were not heard
        self.execution: Execution | None = None
        self.stops_at: type[Any] | None = None  # a chunk for which the daemon seals the handle

    def take(self, chunk: GivenChunk, exit_code: int | None = None) -> None:
        if self.over:
            self.late += 1
            return
        self.said.append(chunk)
        if self.stops_at is not None and isinstance(chunk, self.stops_at):
            self.stop("too large")
        elif isinstance(chunk, GivenDone | ErrorChunk):
            self.over = True

    def close(self, why: str = CLOSED) -> None:
        if not self.over:
            self.said.append(why)
            self.over = True

    def gone(self) -> None:
        self.close()
        self.ends.append("gone")

    def survives(self) -> None:
        self.close()
        self.ends.append("survives")

    def stop(self, reason: str) -> None:
        """The daemon seals the handle, and stops what runs."""
        self.over = True
        assert self.execution is not None
        self.execution.stop(reason)


def call(request_id: str = "r1", parameters: bytes = b"{}", **members: Any) -> Call:
    """A call of the tool `echo`."""
    return Call(handle="h", request_id=request_id, tool="echo", parameters=parameters, action_id="act", **members)


def sent(outbox: Outbox) -> list[Any]:
    """What waits for the peer, taken."""
    frames = []
    while outbox.size:
        frames.append(json.loads(outbox.take(1)))
    return frames
