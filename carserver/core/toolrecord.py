"""What a handle leaves in its run's log: the text of its tool as it comes, at a pace, and its end.

Contract, section 6, In a run. A recorder has at most one append under way, and gives up its text only once that is
durable: what storage refuses is still there to be tried again, so nothing is lost, doubled or out of order. What it
holds is bounded by `recorded_bytes`, however slow storage is.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from msgspec import UNSET
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.attendance import Attendant
from carserver.core.commands import Command, RecordAside
from carserver.core.counters import Counters
from carserver.core.edits import Edit, OpenHandle
from carserver.core.handleedits import Close
from carserver.core.ports import Damaged
from carserver.core.principals import HOST
from carserver.core.runs import Event
from carserver.core.runstore import Clock
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.toolevents import ToolEnd, ToolOutputDelta, ToolStart
from carserver.protocol.tools import ResultRef

log = logging.getLogger("carserver.tools")

CLOSED_AT_ONCE = 64
"""Handles that an earlier daemon left open, closed at a time: together they share a commit, and delay nobody else."""

_CHARACTER_BYTES = 4  # of UTF-8, at most
_ESCAPE_BYTES = 6  # of JSON, that one character takes at most
_DOUBLINGS = 2  # of the pause between two tries, which begins with `probe_s`
_DAMAGED_TRIES = 3  # where storage is damaged: a neighbour in the same commit may have met that


class RecordLog(Protocol):
    """What recording wants of a `RunLog`. `patient` work has no deadline: its outcome is certain."""

    async def submit(self, command: Command, by: Attendant | None, *, patient: bool = False) -> Any:
        """See `core.ports.RunLog`."""
        ...

    async def edit(self, edit: Edit, *, patient: bool = False) -> Any:
        """See `core.ports.RunLog`."""
        ...


def tool_start(handle: str, tool: str) -> Event:
    """The event that a handle begins with in its run's log."""
    return Event(encode(ToolStart(id=handle, name=tool)), "tool_start", None)


def tool_end(end: ToolEnd, event_bytes: int) -> Event:
    """The event that it ends with.

    At the default settings an output has at most 128 KiB here (`result_inline_bytes` as JSON, whose quotes are escaped
    once more), an error `text_bytes`; an error full of control characters takes six times that. So where an event would
    be larger than `event_bytes`, its texts are cut, and say so.
    """
    raw = encode(end)
    if len(raw) > event_bytes:
        characters = event_bytes // (_ESCAPE_BYTES * 2 + _CHARACTER_BYTES)  # the rest is for names and preview
        error = end.error if end.error is UNSET else _cut(end.error, characters)
        raw = encode(replace(end, output=_cut(end.output, characters), error=error))
    return Event(raw, "tool_end", None)


def _cut(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return f"{text[:characters]}… (the first {characters} of {len(text)} characters)"


class Recorder:
    """One handle's, from its `tool_start` to its `tool_end`; `Recorders` makes it.

    A timer is set while something waits for its time, a task runs while something is stored; else there is nothing.

    Args:
        row: The handle, its run, its tool.
        log: Where its events go.
        clock: Time, timers.
        settings: `delta_s`, `delta_bytes`, `recorded_bytes`, `probe_s`, `event_bytes`.
        counters: What is counted.
        ended: Called when there is nothing left to store.
    """

    __slots__ = (
        "_clock",
        "_counters",
        "_due",
        "_end",
        "_ended",
        "_exceeded",
        "_failures",
        "_log",
        "_pending",
        "_room",
        "_row",
        "_settings",
        "_storing",
        "_timer_set",
        "_truncated",
        "over",
    )

    def __init__(
        self,
        row: OpenHandle,
        log: RecordLog,
        clock: Clock,
        settings: Settings,
        counters: Counters,
        ended: Callable[["Recorder"], None],
    ) -> None:
        self.over = False
        self._row = row
        self._log = log
        self._clock = clock
        self._settings = settings
        self._counters = counters
        self._ended = ended
        self._pending = bytearray()  # text that is not durable yet, as UTF-8
        self._room = settings.recorded_bytes  # for more of it
        self._exceeded = False  # there was more than that
        self._truncated = False  # and the log says so; or there is no log any more
        self._end: ToolEnd | None = None
        self._due = clock.monotonic()  # before this nothing is stored
        self._failures = 0  # one after the other
        self._storing = False
        self._timer_set = False

    @property
    def waiting_bytes(self) -> int:
        """Of text that is not durable yet."""
        return len(self._pending)

    def text(self, text: str) -> None:
        """The next of its text; what does not fit is left out, and the log will say so."""
        if self._exceeded or self._truncated or self._end is not None:
            return
        given = text.encode()
        if len(given) > self._room:
            given = given[: _boundary(given, self._room)]
            self._exceeded = True
            self._counters.tool_texts_truncated += 1
        self._room -= len(given)
        self._pending += given
        self._move()

    def end(self, output: str, exit_code: int | None, error: str | None, result_ref: ResultRef | None) -> None:
        """Its end, once: what is left of its text is stored with it. `output` is the result as text."""
        if self._end is not None:
            return
        self._end = ToolEnd(
            id=self._row.handle,
            name=self._row.tool,
            output=output,
            exit_code=UNSET if exit_code is None else exit_code,
            error=UNSET if error is None else error,
            result_ref=UNSET if result_ref is None else result_ref,
        )
        if not self._failures:
            self._due = self._clock.monotonic()
        self._move()

    def _move(self) -> None:
        """Stores what there is to store, or sees that it will be when it is due."""
        announces = self._exceeded and not self._truncated
        if self._storing or self.over or not (self._pending or announces or self._end):
            return
        wait_s = self._due - self._clock.monotonic()
        if wait_s <= 0:
            self._storing = True
            self._clock.spawn(self._store())
        elif not self._timer_set:
            self._timer_set = True
            self._clock.call_later(wait_s, self._timer)

    def _timer(self) -> None:
        self._timer_set = False
        self._move()

    async def _store(self) -> None:
        end = self._end  # it may come while a delta is under way
        try:
            if end is None:
                await self._store_delta()
            else:
                await self._store_end(end)
        except RpcError as error:
            self._refused(error, end)
        except BaseException:  # a defect, and it is said where all are; nobody may wait for this one
            self._finish()
            raise
        else:
            self._failures = 0
        self._storing = False
        self._move()

    async def _store_delta(self) -> None:
        size = self._piece(0)
        truncates = self._exceeded and size == len(self._pending)
        self._due = self._clock.monotonic() + self._settings.delta_s
        command = RecordAside(
            run_id=self._row.run_id,
            principal=HOST,
            now_ms=self._clock.now_ms(),
            events=[self._delta(0, size, truncates=truncates)],
        )
        await self._log.submit(command, None, patient=True)
        del self._pending[:size]
        self._truncated |= truncates

    async def _store_end(self, end: ToolEnd) -> None:
        events = [*self._rest(), tool_end(end, self._settings.event_bytes)]
        row = self._row
        close = Close(handle=row.handle, run_id=row.run_id, events=events, now_ms=self._clock.now_ms(), principal=HOST)
        await self._log.edit(close, patient=True)
        self._finish()

    def _rest(self) -> Iterator[Event]:
        """All that is left of its text, in pieces."""
        start = 0
        while start < len(self._pending) or (self._exceeded and not self._truncated and not start):
            stop = self._piece(start)
            last = stop == len(self._pending)
            yield self._delta(start, stop, truncates=last and self._exceeded)
            if last:
                return
            start = stop

    def _piece(self, start: int) -> int:
        """Where a piece ends that begins at `start`."""
        return _boundary(self._pending, start + max(self._settings.delta_bytes, _CHARACTER_BYTES))

    def _delta(self, start: int, stop: int, *, truncates: bool) -> Event:
        delta = ToolOutputDelta(
            id=self._row.handle,
            name=self._row.tool,
            delta=self._pending[start:stop].decode(),
            truncated=True if truncates else UNSET,
        )
        return Event(encode(delta), "tool_output_delta", None)

    def _refused(self, error: RpcError, end: ToolEnd | None) -> None:
        """Nothing was stored, so all is still here: it is tried again, unless that is for nothing."""
        self._failures += 1
        if error.data.get("outcome") == "unknown":
            self._finish()  # an fsync failed: the daemon says so and stops, and the next one closes the handle
        elif not _may_pass(error) or (isinstance(error, Damaged) and self._failures >= _DAMAGED_TRIES):
            self._without_log(error, end)
        else:
            self._counters.tool_record_retries += 1
            pause_s = self._settings.probe_s * 2 ** min(self._failures - 1, _DOUBLINGS)
            self._due = self._clock.monotonic() + pause_s

    def _without_log(self, error: RpcError, end: ToolEnd | None) -> None:
        """There is no log for its text (the run was deleted), or none that takes it; its row is still to be removed."""
        if end is not None:
            self._give_up(error)
            self._finish()
            return
        if error.kind is not ErrorKind.NOT_FOUND:
            self._give_up(error)
        self._failures = 0
        self._truncated = True
        self._pending.clear()

    def _give_up(self, error: RpcError) -> None:
        self._counters.tool_records_given_up += 1
        log.warning(
            "handle %s of run %r: its output is not recorded: %s", self._row.handle, self._row.run_id, error.message
        )

    def _finish(self) -> None:
        if not self.over:
            self.over = True
            self._pending.clear()
            self._ended(self)


def _boundary(text: bytes | bytearray, stop: int) -> int:
    """`stop`, or the end of the text before it, or the beginning of the character that `stop` is within."""
    if stop >= len(text):
        return len(text)
    while text[stop] & 0xC0 == 0x80:  # a byte of UTF-8 that goes on with a character
        stop -= 1
    return stop


def _may_pass(error: RpcError) -> bool:
    return error.kind in (ErrorKind.UNAVAILABLE, ErrorKind.OVERLOADED)


class Recorders:
    """The recorders of all handles in runs.

    A handle begins only where storage takes its `tool_start`. So while storage takes nothing there come no more of
    them, and what waits is bounded by the live handles, each with `recorded_bytes` of text and its end.

    Args:
        log: Where events go.
        clock: Time, timers.
        settings: See `Recorder`.
        counters: What is counted.
    """

    def __init__(self, log: RecordLog, clock: Clock, settings: Settings, counters: Counters) -> None:
        self._log = log
        self._clock = clock
        self._settings = settings
        self._counters = counters
        self._recorders: set[Recorder] = set()
        self._left: deque[OpenHandle] = deque()
        self._reason = ""

    def __len__(self) -> int:
        """How many have not ended: the handles whose `tool_end` is not durable."""
        return len(self._recorders) + len(self._left)

    @property
    def waiting_bytes(self) -> int:
        """Of text that is not durable yet, all together."""
        return sum(recorder.waiting_bytes for recorder in self._recorders)

    def begin(self, handle: str, tool: str, run_id: str) -> Recorder:
        """For a handle whose `tool_start` is durable."""
        return self._begin(OpenHandle(handle, run_id, tool), self._recorders.discard)

    def _begin(self, row: OpenHandle, ended: Callable[[Recorder], None]) -> Recorder:
        recorder = Recorder(row, self._log, self._clock, self._settings, self._counters, ended)
        self._recorders.add(recorder)
        return recorder

    def finish_open(self, rows: Sequence[OpenHandle], reason: str) -> None:
        """The handles that the daemon before this one left open end; `reason` is their error. Nothing waits for it."""
        self._left.extend(rows)
        self._reason = reason
        for _ in range(CLOSED_AT_ONCE):
            self._finish_next()

    def _finish_next(self) -> None:
        if self._left:
            self._begin(self._left.popleft(), self._finished).end("", None, self._reason, None)

    def _finished(self, recorder: Recorder) -> None:
        self._recorders.discard(recorder)
        self._finish_next()
