"""Handles that have ended, until they are forgotten: by time, by number and by size of each principal's."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from carserver.config import Settings
from carserver.core.handles import Handle
from carserver.core.ports import CallLater


class Finished:
    """The finished handles.

    Args:
        settings: `finished_s`, `finished_handles`, `finished_bytes`.
        now: A monotonic clock, seconds.
        call_later: Calls back after so many seconds.
        forget: Called with each handle that goes because of its age, or for newer ones.
    """

    def __init__(
        self,
        settings: Settings,
        now: Callable[[], float],
        call_later: CallLater,
        forget: Callable[[Handle], None],
    ) -> None:
        self._kept_s = settings.finished_s
        self._maximum = settings.finished_handles
        self._maximum_bytes = settings.finished_bytes
        self._now = now
        self._call_later = call_later
        self._forget = forget
        self._owners: dict[str, _Kept] = {}
        self._timer_set = False

    def __len__(self) -> int:
        """How many there are."""
        return sum(len(kept.handles) for kept in self._owners.values())

    @property
    def bytes(self) -> int:
        """What they keep, about."""
        return sum(kept.bytes for kept in self._owners.values())

    def add(self, handle: Handle) -> None:
        """It has ended just now."""
        kept = self._owners.setdefault(handle.owner, _Kept())
        kept.put(handle, self._now() + self._kept_s)
        self._set_timer(self._kept_s)
        while len(kept.handles) > self._maximum or (kept.bytes > self._maximum_bytes and len(kept.handles) > 1):
            self._drop(next(iter(kept.handles)))

    def changed(self, handle: Handle) -> None:
        """A poll took something of it."""
        kept = self._owners.get(handle.owner)
        if kept is not None and handle in kept.handles:
            kept.put(handle, kept.handles[handle].due_s)

    def remove(self, handle: Handle) -> None:
        """It is forgotten, by a poll."""
        kept = self._owners.get(handle.owner)
        if kept is None or handle not in kept.handles:
            return
        kept.bytes -= kept.handles.pop(handle).size
        if not kept.handles:
            del self._owners[handle.owner]

    def _drop(self, handle: Handle) -> None:
        self.remove(handle)
        self._forget(handle)

    def _set_timer(self, delay_s: float) -> None:
        if not self._timer_set:
            self._timer_set = True
            self._call_later(delay_s, self._due)

    def _due(self) -> None:
        self._timer_set = False
        now = self._now()
        for kept in list(self._owners.values()):
            while kept.handles and kept.next_due_s <= now:
                self._drop(next(iter(kept.handles)))
        if self._owners:
            self._set_timer(min(kept.next_due_s for kept in self._owners.values()) - now)


class _Place(NamedTuple):
    """What is known of a handle here: the bytes that it keeps, and when it goes."""

    size: int
    due_s: float


class _Kept:
    """One principal's, the one that ended first at the front."""

    __slots__ = ("bytes", "handles")

    def __init__(self) -> None:
        self.handles: OrderedDict[Handle, _Place] = OrderedDict()
        self.bytes = 0

    @property
    def next_due_s(self) -> float:
        return next(iter(self.handles.values())).due_s

    def put(self, handle: Handle, due_s: float) -> None:
        before = self.handles.get(handle)
        self.handles[handle] = _Place(handle.size, due_s)
        self.bytes += handle.size - (before.size if before is not None else 0)
