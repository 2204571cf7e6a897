"""Gets the events of one run to the daemon: in the background, in order, each once, whatever becomes of connections.

One batch is under way at a time, and what is recorded meanwhile shares the next. A batch is frozen when it is first
sent: it is sent again as it was, with its `batch_id`, until the daemon has answered; so it is never stored twice, and
none comes before it.
"""

import asyncio
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final
from uuid import uuid4

from msgspec import Raw, Struct

from carserver.client.buffer import Buffer, Entry
from carserver.client.calls import Calls
from carserver.client.errors import BufferFull, CallError, ClientError, EventRefused, NotAuthorised, NotRecorded
from carserver.client.pauses import Pauses
from carserver.protocol.errors import ErrorKind
from carserver.protocol.runs import Recorded, Snapshot, Status

BATCH_EVENTS: Final = 1_000  # the daemon's own bound
BATCH_BYTES: Final = 1024 * 1024
TICK_S: Final = 0.05  # between two batches, unless there is much to send: so pieces of text become one event
_TRIES: Final = 3  # for what another call on the same connection may have been the reason of
_PLACE: Final = re.compile(r"events\[(\d+)\]")
_UNREAD: Final = frozenset({ErrorKind.PARSE_ERROR.type, ErrorKind.INVALID_REQUEST.type})
_LIMIT: Final = ErrorKind.LIMIT_EXCEEDED.type


class Batch(Struct):
    """What one `runs.record` carries; `tries` of it ended in a way that it might itself be the reason of."""

    id: str
    entries: list[Entry]
    tries: int = 0


class Recorder:
    """The recording of one run; all but `put` and `write` from a thread belongs to the loop that it was made on.

    Args:
        calls: whom to ask.
        run_id: the run.
        buffer: where the events wait; this one takes them out.
        waits: what happens where there is no room: `record` waits, or raises.
        patience_s: how long it waits without any getting through.
        cancelled: called when an answer tells that the run was cancelled, with the reason.
        away: why there is no connection, where there is none.
    """

    def __init__(
        self,
        calls: Calls,
        run_id: str,
        buffer: Buffer,
        *,
        waits: bool,
        patience_s: float,
        cancelled: Callable[[str], None],
        away: Callable[[], ClientError | None],
    ) -> None:
        self.run_id = run_id
        self._trouble: ClientError | None = None  # why the last attempt did not get through
        self._calls = calls
        self._buffer = buffer
        self._waits = waits
        self._patience_s = patience_s
        self._cancelled = cancelled
        self._away = away
        self._prefix = uuid4().hex
        self._numbers = 0
        self._batches: deque[Batch] = deque()  # frozen; the first is under way
        self._settled = 0  # events that were acknowledged or refused
        self._missed = 0  # events that came when nothing was recorded any more
        self._said_cancelled = False
        self._refused: EventRefused | None = None  # not told yet
        self._broken: str | None = None  # why nothing is recorded any more
        self._known = False  # that what was sent last was not stored
        self._connections = self._attended = 0  # numbers of the newest one, and of that on which the run is attended
        self._sent_at = -math.inf
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._work = asyncio.Event()  # there is something to do
        self._urgent = asyncio.Event()  # and it is not to wait for more
        self._progress = asyncio.Event()  # replaced whenever it is set
        self._turns = asyncio.Lock()  # those who wait for room get it in their order
        self._task = asyncio.create_task(self._run(), name=f"carserver client: recording {run_id}")

    # For those who record.

    @property
    def on_loop(self) -> bool:
        """Whether the calling thread is the loop's, which must not block."""
        return threading.get_ident() == self._thread

    def put_now(self, entries: Sequence[Entry]) -> None:
        """Takes in all the events, or none; from any thread.

        Raises:
            BufferFull: there is no room.
            EventRefused, NotRecorded: earlier ones were not stored.
        """
        self._check()
        if entries and (self._turns.locked() or not self._buffer.put(entries, whole=True)):
            raise self._full()
        self._wake()

    def put_beyond(self, entry: Entry) -> None:
        """Takes in the run's first or last event, whatever the bounds say."""
        self._buffer.put([entry], whole=True, beyond=True)
        self._wake()

    def write_now(self, pieces: Sequence[bytes]) -> None:
        """The same for a text. One of several pieces may be taken in by half: the error says how many pieces were."""
        self._check()
        for taken, piece in enumerate(pieces):
            if self._turns.locked() or not self._buffer.write(piece, now_ms()):
                raise self._full(taken)
        self._wake()

    async def put(self, entries: Sequence[Entry]) -> None:
        """Takes in the events, as the policy has it: all or none, or one after another as room comes.

        Raises:
            BufferFull: there is no room, or none came within the patience; `taken` says how many were taken in.
            EventRefused, NotRecorded: earlier ones were not stored.
        """
        if not self._waits:
            self.put_now(entries)
            return
        self._check()
        if not self._turns.locked() and self._buffer.put(entries, whole=True):
            self._wake()
            return
        taken = 0
        async with self._turns:
            self._check()
            while (taken := taken + self._buffer.put(entries[taken:], whole=False)) < len(entries):
                await self._room(taken)
        self._wake()

    async def write(self, pieces: Sequence[bytes]) -> None:
        """The same for a text; `taken` counts pieces."""
        if not self._waits or not pieces:
            self.write_now(pieces)
            return
        self._check()
        at_ms = now_ms()
        if len(pieces) == 1 and not self._turns.locked() and self._buffer.write(pieces[0], at_ms):
            self._wake()
            return
        async with self._turns:
            self._check()
            for taken, piece in enumerate(pieces):
                while not self._buffer.write(piece, at_ms):
                    await self._room(taken)
        self._wake()

    def put_blocking(self, entries: Sequence[Entry]) -> None:
        """As `put`, from another thread than the loop's, which is blocked meanwhile."""
        self._check()
        taken = 0

        def put() -> bool:
            nonlocal taken
            taken += self._buffer.put(entries[taken:], whole=not self._waits)
            return taken == len(entries)

        self._block(put, lambda: taken)

    def write_blocking(self, pieces: Sequence[bytes]) -> None:
        """As `write`, likewise."""
        self._check()
        at_ms = now_ms()
        for taken, piece in enumerate(pieces):
            self._block(partial(self._buffer.write, piece, at_ms), partial(int, taken))

    def _block(self, put: Callable[[], bool], taken: Callable[[], int]) -> None:
        while True:
            changes = self._buffer.changes  # before it looks: what ends the recording from here on wakes it
            self._check_broken()
            done = put()
            self._wake()
            if done:
                return
            if not self._waits or not self._buffer.wait(changes, self._patience_s):
                raise self._full(taken())

    async def flush(self, patience_s: float) -> None:
        """Waits until what was recorded before is durable.

        Raises:
            NotRecorded: it is not within `patience_s`, or never will be.
            EventRefused: the daemon did not take one of the events; all others are durable.
        """
        target = self._buffer.total
        self._urgent.set()
        self._work.set()
        try:
            async with asyncio.timeout(patience_s):
                while self._settled < target and self._broken is None:
                    await self._progress.wait()
        except TimeoutError:
            raise self.unrecorded(f"{self.trouble} (waited {patience_s:g} s)") from None
        self._check()

    @property
    def broken(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._broken is not None

    def miss(self, events: int) -> None:
        """So many events came after that: the end of the run says so."""
        self._missed += events

    # For the run's beginning and end, and for news of the connection.

    def unrecorded(self, why: str) -> NotRecorded:
        """Says how many events are not acknowledged; those that are under way may have been stored all the same."""
        if self._batches and not self._known:
            why = f"{why}; what became of the {len(self._batches[0].entries)} that were sent last is not known"
        return NotRecorded(self.run_id, self._buffer.total - self._settled + self._missed, why)

    @property
    def trouble(self) -> str:
        """Why what waits has not got through."""
        return str(self._trouble or self._away() or "the daemon has not answered yet")

    def connected(self) -> None:
        """There is another connection: it attends the run when the next events are recorded, or for being asked to."""
        self._connections += 1
        self._work.set()

    def give_up(self, why: str, *, known: bool = False) -> None:
        """Nothing is recorded any more; `known`: also nothing of what is under way."""
        if self._broken is None:
            self._broken, self._known = why, known
            self._buffer.wake()
            self._told()

    async def stop(self) -> None:
        """Ends the background task."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # What it does in the background.

    async def _run(self) -> None:
        pauses = Pauses(math.inf)
        try:
            while True:
                await self._due()
                try:
                    await self._one()
                except ClientError as error:
                    self._trouble = error
                    if not self._again(error):
                        raise
                    await pauses.pause(_asked_for(error))
                else:
                    self._trouble = None
                    pauses.reset()
        except ClientError as error:
            self.give_up(str(error), known=isinstance(error, CallError) and not _is_unread(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, those who record are told
            self.give_up(f"{type(error).__name__}: {error}")

    async def _due(self) -> None:
        """Waits until there is something to do, and then a little for more of it."""
        if self._batches:
            return
        while not self._buffer.waiting and self._attended == self._connections:
            await self._work.wait()
            self._work.clear()  # before it looks again: what a thread puts in from here on sets it
        pause = self._sent_at + TICK_S - self._loop.time()
        if pause > 0 and not self._urgent.is_set():
            try:
                async with asyncio.timeout(pause):
                    await self._urgent.wait()
            except TimeoutError:
                pass

    async def _one(self) -> None:
        """One batch; or attends the run, where there is none to send."""
        if not self._batches:
            entries = self._buffer.take(BATCH_EVENTS, BATCH_BYTES)
            if not self._buffer.waiting:
                self._urgent.clear()
            if not entries:
                await self._attend()
                return
            self._freeze(entries)
        batch = self._batches[0]
        connections = self._connections
        self._sent_at = self._loop.time()
        try:
            answer = await self._record(batch)
        except CallError as error:
            if error.passing:
                raise
            self._not_taken(batch, error)
            return
        self._batches.popleft()
        self._settle(batch.entries)
        self._attended = connections  # an older one, if another came meanwhile
        if answer.status is Status.CANCELLED:
            await self._say_cancelled()

    async def _record(self, batch: Batch) -> Recorded:
        params = {
            "run_id": self.run_id,
            "events": [Raw(one.raw) for one in batch.entries],
            "at_ms": [one.at_ms for one in batch.entries],
            "batch_id": batch.id,
        }
        answer: Recorded = await self._calls.call("runs.record", params, result_type=Recorded, again=True)
        return answer

    async def _attend(self) -> None:
        connections = self._connections
        try:
            await self._calls.call("runs.resume", {"run_id": self.run_id}, result_type=Snapshot, again=True)
        except CallError as error:
            if error.data.get("reason") != "run_terminal":
                raise
            await self._say_cancelled()
        self._attended = connections

    async def _say_cancelled(self) -> None:
        """It was cancelled while there was no connection to say so; or it is over for another reason."""
        if self._said_cancelled:
            return
        run: Snapshot = await self._calls.call("runs.get", {"run_id": self.run_id}, result_type=Snapshot, again=True)
        self._said_cancelled = run.status is Status.CANCELLED
        if self._said_cancelled:
            self._cancelled(run.cancel_reason or "")

    def _not_taken(self, batch: Batch, error: CallError) -> None:
        """Nothing of the batch was stored: without the event that is the reason, or in halves, the rest may be."""
        place = _PLACE.match(str(error.data.get("path", ""))) or _PLACE.search(error.message)
        entries = batch.entries
        if _is_unread(error):
            raise error
        if place is not None and int(place[1]) < len(entries):
            refused = entries.pop(int(place[1]))
            self._batches.popleft()
            self._freeze(entries)
            self._refuse(refused, error)
        elif error.type == _LIMIT and error.data.get("limit") != "run_events" and len(entries) > 1:
            self._batches.popleft()
            middle = len(entries) // 2
            self._freeze(entries[middle:])
            self._freeze(entries[:middle])
        else:
            raise error

    def _freeze(self, entries: list[Entry]) -> None:
        """The next batch to be sent."""
        if entries:
            self._numbers += 1
            self._batches.appendleft(Batch(f"{self._prefix}-{self._numbers}", entries))

    def _refuse(self, entry: Entry, error: CallError) -> None:
        if self._refused is None:
            self._refused = EventRefused(entry.raw, error.message)
        else:
            self._refused.events += 1
        self._settle([entry])

    def _again(self, error: ClientError) -> bool:
        """Whether the same may go through later. The batch goes as it was: it may have been stored."""
        if error.passing or isinstance(error, NotAuthorised):  # a token may be on its way from a file to a daemon
            return True
        if isinstance(error, CallError) and not _is_unread(error):
            return False
        if self._batches:
            self._batches[0].tries += 1
        return not self._batches or self._batches[0].tries < _TRIES

    def _settle(self, entries: Sequence[Entry]) -> None:
        self._settled += len(entries)
        self._buffer.release(entries)
        self._told()

    def _told(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    # What those who record share.

    def _wake(self) -> None:
        """Something was put in. An event that is set need not be set again."""
        buffer = self._buffer
        much = buffer.held >= BATCH_EVENTS or buffer.held_bytes >= BATCH_BYTES
        if not self._work.is_set() or (much and not self._urgent.is_set()):
            if self.on_loop:
                self._wake_here(much=much)
            else:
                self._loop.call_soon_threadsafe(partial(self._wake_here, much=much))

    def _wake_here(self, *, much: bool) -> None:
        self._work.set()
        if much:
            self._urgent.set()

    async def _room(self, taken: int) -> None:
        """Waits for some, on the loop."""
        self._urgent.set()
        self._work.set()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._progress.wait()
        except TimeoutError:
            raise self._full(taken) from None
        self._check_broken()  # a refusal is told to who has had nothing taken in

    def _check(self) -> None:
        """Tells what became of earlier events: a refusal once, the end of all recording every time."""
        self._check_broken()
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise refused

    def _check_broken(self) -> None:
        if self._broken is not None:
            raise self.unrecorded(self._broken)

    def _full(self, taken: int = 0) -> BufferFull:
        buffer = self._buffer
        return BufferFull(
            f"{buffer.held} events ({buffer.held_bytes} bytes) of {self.run_id} wait to be recorded, "
            f"and the buffer has room for {buffer.events} ({buffer.size} bytes): {self.trouble}",
            taken,
        )


def _is_unread(error: CallError) -> bool:
    """Whether it is of a message that the daemon could not read: perhaps another one than the batch."""
    return error.type in _UNREAD or error.data.get("limit") == "brackets"


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _asked_for(error: ClientError) -> float:
    """Seconds that the daemon asked to be left alone."""
    asked = error.data.get("retry_after_ms") if isinstance(error, CallError) else None
    return asked / 1000 if isinstance(asked, int) else 0.0
