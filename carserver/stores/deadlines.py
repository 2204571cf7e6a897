"""Answers that storage owes, and by when: after `storage_s` each, so they are due in the order they were asked in."""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

_SLACK = 1_024  # finished ones that may stand among the rest before they are swept out


class _Due(NamedTuple):
    at: float
    future: "weakref.ref[asyncio.Future[Any]]"  # weak, so that an answer of a megabyte goes when it is sent


class Deadlines:
    """Gives up futures that are not resolved in time. One timer, and about as many entries as are owed.

    Args:
        after_s: How long each has.
        give_up: Called with each that is late.
    """

    def __init__(self, after_s: float, give_up: Callable[["asyncio.Future[Any]"], None]) -> None:
        self._after_s = after_s
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._due: deque[_Due] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, future: "asyncio.Future[Any]", owed: int) -> None:
        """One more; `owed` is how many there are with it that have no answer yet."""
        if len(self._due) > 2 * owed + _SLACK:
            self._due = deque(due for due in self._due if _is_open(due))
        self._due.append(_Due(self._loop.time() + self._after_s, weakref.ref(future)))
        if self._timer is None:
            self._timer = self._loop.call_at(self._due[0].at, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._due and (self._due[0].at <= now or not _is_open(self._due[0])):
            future = self._due.popleft().future()
            if future is not None and not future.done():
                self._give_up(future)
        if self._due:
            self._timer = self._loop.call_at(self._due[0].at, self._look)

    def close(self) -> None:
        """No more timers."""
        if self._timer is not None:
            self._timer.cancel()


def _is_open(due: _Due) -> bool:
    future = due.future()
    return future is not None and not future.done()


def resolve(future: "asyncio.Future[Any]", result: object) -> None:
    """Answers a caller who is still there: an Exception is raised where it waits, all else is what it waited for."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
        future.exception()  # its caller may have gone: then nobody retrieves it, which is no defect
    else:
        future.set_result(result)
