"""A run as a block: created at its beginning, recorded in the background, ended as the block ends.

async with car.run("fix the tests") as run:
    await run.record({"type": "turn_start", "turn": 1})
    await run.text("Looking at the failures.")
    run.result = "Fixed."
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import Token
from types import TracebackType
from typing import Any, Final, Protocol, Self
from uuid import uuid4

import msgspec
from msgspec import UNSET, Raw, Struct

from carserver.client.buffer import Buffer, Entry, entry, pieces
from carserver.client.calls import Calls, given
from carserver.client.connection import Connection
from carserver.client.current import current
from carserver.client.errors import CallError, ClientError, EventRefused, NotRecorded, RunOver
from carserver.client.link import Link
from carserver.client.recorder import Recorder, now_ms
from carserver.protocol.runs import FINAL, Cancelled, Snapshot, Status
from carserver.protocol.runs import RunCancelled as CancelledParams

BUFFER_EVENTS: Final = 10_000  # ten batches
BUFFER_BYTES: Final = 16 * 1024 * 1024
ERROR_BYTES: Final = 256 * 1024  # of a run's error or reason, as UTF-8 (contract, section 3)
_CAR_CLOSES_S = 2.0  # for what waits, when the car is closed within the block
_LEAVES = 8  # exceptions of a group that are told
_EARLY = 64  # cancelled runs that are remembered while it is not known which is ours
_ENDS = frozenset({"agent_end", "error"})  # what ends a run

_logger = logging.getLogger("carserver.client")


class Carrier(Calls, Protocol):
    """A `Car`, as far as it is needed here."""

    link: Link


class RunCancelled(asyncio.CancelledError):
    """The run was cancelled from outside, and so its task: no error, and no `except Exception` takes it for one.

    Leaves the block of `car.run`; whoever has other runs to do catches it there.
    """

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(f"{run_id} was cancelled: {reason}")
        self.run_id = run_id
        self.reason = reason


class _Type(Struct):
    type: str


_type_decoder = msgspec.json.Decoder(_Type)
_cancelled_decoder = msgspec.json.Decoder(CancelledParams)


class Run:
    """One run of this program's: `async with car.run(…) as run`.

    What is recorded is put into a buffer, and sent in batches that share round trips. While the daemon is away it
    waits there; a batch that was under way is sent again, and stored once. What the end of this process takes with it
    is what has not been flushed: `await run.flush()` where something must be durable before what follows.

    The block's end records `agent_end` with `result`, unless the block has recorded an `agent_end` or `error` itself.
    An exception fails the run with `Type: message`; being cancelled or interrupted from the keyboard cancels it. All
    this waits for the daemon as long as `patience_s`, and then says what was not recorded: as `NotRecorded`, or as a
    note on the exception that ends the block.

    When the run is cancelled from outside (`runs.cancel`), the task that entered the block is cancelled: it sees
    CancelledError, as do the tasks of a TaskGroup in it, but no others that it has begun. `RunCancelled`, which is a
    CancelledError, leaves the block, unless the task was cancelled otherwise as well. Events that wait are still
    recorded; the end is the daemon's.

    All of it belongs to the car's loop, but for `record_from_thread`, `text_from_thread` and the properties. The
    synchronous twin has `open(None)` and `close(error)` run on its loop, puts the run into `current` in the thread of
    its block, and records by the two methods for threads, looking at `cancelled` before: there is no task to cancel.

    Args:
        car: the daemon.
        prompt: what the agent is to do.
        key: the run's idempotency key: the same key is the same run, also in another process, which goes on with it if
            it is not over. None: one is drawn, and a lost connection makes no second run.
        session_id: the conversation.
        agent_id: whose run it is said to be.
        parent_run_id: the run that this one is part of.
        outcome_description: what it is to come to.
        metadata: anything of the caller's that is a JSON object.
        starts: whether `agent_start` is recorded at the beginning; not where the agent's own events have one.
        waits: where the buffer is full, `record` waits for room; otherwise it raises BufferFull. Nothing is dropped.
        buffer_events: the buffer's bound, what is under way included.
        buffer_bytes: likewise, or one larger event.
        patience_s: how long the block's end, and each wait for room, lasts at most, seconds; None: as the link has it.
    """

    def __init__(
        self,
        car: Carrier,
        prompt: str,
        *,
        key: str | None = None,
        session_id: str = "",
        agent_id: str | None = None,
        parent_run_id: str | None = None,
        outcome_description: str | None = None,
        metadata: Any = None,
        starts: bool = True,
        waits: bool = True,
        buffer_events: int = BUFFER_EVENTS,
        buffer_bytes: int = BUFFER_BYTES,
        patience_s: float | None = None,
    ) -> None:
        self.id = ""
        self.prompt = prompt
        self.result = ""
        """What the agent came to: the `text` of the `agent_end` at the end of the block."""
        self.snapshot: Snapshot | None = None
        """The run as it was when the block began."""
        self._car = car
        self._creation = given(
            {
                "prompt": prompt,
                "session_id": session_id,
                "metadata": UNSET if metadata is None else metadata,
                "idempotency_key": uuid4().hex if key is None else key,
            },
            agent_id=agent_id,
            parent_run_id=parent_run_id,
            outcome_description=outcome_description,
        )
        self._starts = starts
        self._waits = waits
        self._buffer = Buffer(buffer_events, buffer_bytes)
        self._patience_s = car.link.patience_s if patience_s is None else patience_s
        self._recorder: Recorder | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0  # how often the task was cancelled before
        self._cancels = False  # the run has cancelled the task
        self._ended = False  # an end was recorded
        self._closing = False
        self._reason: str | None = None  # why it was cancelled
        self._early: dict[str, str] = {}
        self._removes: list[Callable[[], None]] = []
        self._token: Token[Run | None] | None = None

    # The block.

    async def __aenter__(self) -> Self:
        await self.open(asyncio.current_task())
        self._token = current.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cancelled = isinstance(error, asyncio.CancelledError)
        if self._cancels and self._task is not None:
            # As in asyncio.timeout: where the task was cancelled by this run alone, it may go on after the block.
            cancelled = self._task.uncancel() <= self._cancelling and cancelled
        try:
            await self.close(error)
        finally:
            if self._token is not None:
                with suppress(ValueError):  # left in another context than entered: a generator's, a test fixture's
                    current.reset(self._token)
        if cancelled and self._cancels:
            raise RunCancelled(self.id, self._reason or "") from error

    async def open(self, task: "asyncio.Task[Any] | None") -> None:
        """Creates the run, or goes on with that of the key; `task` is cancelled when the run is.

        Raises:
            RunOver: the key's run is over.
            CallError: `conflict` (`key_reused`), where the key's run was created with other params; and others.
            ClientError: no daemon, within the link's patience.
        """
        if self._removes or self._closing:
            raise RuntimeError("a run is entered once; make another with car.run()")
        self._removes = [self._car.link.on("runs.cancelled", self._hear)]
        self._task = task
        self._cancelling = 0 if task is None else task.cancelling()
        try:
            run = await self._call("runs.create", self._creation)
            if run.status is Status.INTERRUPTED:
                run = await self._call("runs.resume", {"run_id": run.id})
        except BaseException:
            self._leave()
            raise
        if run.status in FINAL:
            self._leave()
            raise RunOver(f"{run.id}, the run of this key, is {run.status} already: a new run wants another key")
        self.id, self.snapshot = run.id, run
        self._begin(run)

    def _begin(self, run: Snapshot) -> None:
        recorder = Recorder(
            self._car,
            run.id,
            self._buffer,
            waits=self._waits,
            patience_s=self._patience_s,
            cancelled=self._cancelled_by,
            away=lambda: self._car.link.failure,
        )

        async def up(_: Connection) -> None:
            recorder.connected()

        async def closing() -> None:
            with suppress(ClientError):
                await recorder.flush(_CAR_CLOSES_S)
            recorder.give_up("the car was closed before the run's block had ended")

        self._removes += [self._car.link.on_up(up), self._car.link.on_close(closing)]
        self._recorder = recorder
        if self._starts and run.event_count == 0:
            recorder.put_beyond(entry({"type": "agent_start", "prompt": self.prompt}, now_ms()))
        if run.id in self._early:
            self._cancelled_by(self._early[run.id])
        self._early.clear()

    async def close(self, error: BaseException | None = None) -> None:
        """Ends the run as its block ended, with `error` or without: see the class.

        Raises:
            NotRecorded, EventRefused: not everything was recorded. Where there is an `error`, that has a note instead.
        """
        recorder = self._recorder
        if recorder is None or self._closing:
            return
        self._closing = True
        try:
            trouble = await self._end(recorder, error)
        except BaseException as stopped:
            if (lost := recorder.unrecorded("its end was not waited for")).events:
                _logger.error("%s", lost)  # noqa: TRY400 - in one line, and without what a traceback tells
                stopped.add_note(str(lost))
            raise
        finally:
            self._leave()
            recorder.give_up("its block had ended")  # who still waits for room is told, and waits no longer
            await recorder.stop()
        if trouble is None and (late := recorder.unrecorded("recorded while its block ended")).events:
            trouble = late  # by who was waiting for room, and was told that it is recorded
        if trouble is not None:
            if error is None:
                raise trouble
            _logger.error("%s", trouble)
            error.add_note(str(trouble))

    # Recording.

    async def record(self, *events: object) -> None:
        """Records events: objects with a string `type`, as dicts, msgspec Structs, or JSON as bytes or `msgspec.Raw`.

        With `waits`, the default, it takes them in one after another as there is room; else all of them or none.

        Raises:
            BufferFull: there is no room, or none came for `patience_s`; `taken` says how many were taken in.
            EventRefused: the daemon did not take an earlier event, though all others; nothing of these was taken in.
            NotRecorded: nothing is recorded any more: the run was deleted, or is full.
            RunOver: the block has ended.
            TypeError, ValueError: one of these is no event; none was taken in.
        """
        recorder = self._recording()
        at_ms = now_ms()
        entries = [entry(event, at_ms) for event in events]
        await recorder.put(entries)
        self._note(entries)

    def record_nowait(self, *events: object) -> None:
        """Records all of the events or, where there is no room, none, and raises BufferFull; from any thread."""
        recorder = self._recording()
        at_ms = now_ms()
        entries = [entry(event, at_ms) for event in events]
        recorder.put_now(entries)
        self._note(entries)

    def record_from_thread(self, *events: object) -> None:
        """As `record`, from another thread than the loop's: it blocks that thread where `record` waits."""
        recorder = self._in_thread()
        at_ms = now_ms()
        entries = [entry(event, at_ms) for event in events]
        recorder.put_blocking(entries)
        self._note(entries)

    async def text(self, text: str) -> None:
        """Records a piece of what the agent writes: `text_delta`. Pieces that follow each other share an event.

        Raises:
            BufferFull, EventRefused, NotRecorded, RunOver: as `record`; `taken` counts the first pieces of a long text.
            UnicodeEncodeError: it has lone surrogates.
        """
        await self._recording().write(pieces(text))

    def text_nowait(self, text: str) -> None:
        """As `text`; where there is no room, it raises BufferFull. From any thread."""
        self._recording().write_now(pieces(text))

    def text_from_thread(self, text: str) -> None:
        """As `text`, from another thread than the loop's: it blocks that thread where `text` waits."""
        self._in_thread().write_blocking(pieces(text))

    async def flush(self) -> None:
        """Waits until what was recorded so far is durable, at most `patience_s`.

        Raises:
            NotRecorded, EventRefused: it is not.
        """
        await self._recording().flush(self._patience_s)

    # What is known of it.

    @property
    def cancelled(self) -> bool:
        """Whether the run was cancelled from outside."""
        return self._reason is not None

    @property
    def cancel_reason(self) -> str | None:
        """Why it was."""
        return self._reason

    @property
    def over(self) -> bool:
        """Whether the block has ended, or is about to: nothing more can be recorded."""
        return self._closing

    @property
    def recorder(self) -> Recorder:
        """What records; for `logs`."""
        return self._recording()

    # What is beneath.

    def _recording(self) -> Recorder:
        if self._recorder is None or self._closing:
            raise RunOver(f"the block of {self.id or 'this run'} has {'ended' if self._closing else 'not begun'}")
        return self._recorder

    def _in_thread(self) -> Recorder:
        recorder = self._recording()
        if recorder.on_loop:
            raise RuntimeError("this would block the event loop: use `await run.record(…)` here")
        return recorder

    def _note(self, entries: list[Entry]) -> None:
        """Remembers that the run's end is among what was recorded."""
        for one in entries:
            raw = one.raw
            if (b'"agent_end"' in raw or b'"error"' in raw) and _type_decoder.decode(raw).type in _ENDS:
                self._ended = True

    def _hear(self, params: Raw) -> None:
        told = _cancelled_decoder.decode(params)
        if told.run_id == self.id:
            self._cancelled_by(told.reason)
        elif not self.id and len(self._early) < _EARLY:
            self._early[told.run_id] = told.reason

    def _cancelled_by(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            if self._task is not None and not self._closing:
                self._cancels = True
                self._task.cancel(f"{self.id} was cancelled: {reason}")

    def _leave(self) -> None:
        """Hears of nothing any more."""
        for remove in self._removes:
            remove()

    async def _call(self, method: str, params: dict[str, Any], result_type: Any = Snapshot) -> Any:
        return await self._car.call(method, params, result_type=result_type, again=True)

    async def _end(self, recorder: Recorder, error: BaseException | None) -> ClientError | None:
        """Has everything recorded, and then the end; what went wrong."""
        deadline = asyncio.get_running_loop().time() + self._patience_s
        if isinstance(error, SystemExit) and not error.code:
            error = None  # the program ends, and all is well
        if error is None and not self.cancelled and not self._ended:
            recorder.put_beyond(entry({"type": "agent_end", "text": self.result}, now_ms()))
        trouble: ClientError | None = None
        try:
            await recorder.flush(self._patience_s)
        except (NotRecorded, EventRefused) as found:
            trouble = found
        if self.cancelled or (error is None and trouble is None):
            return trouble
        self._leave()  # what follows may be a cancel, of which this run need not hear
        try:
            async with asyncio.timeout_at(deadline):
                await self._tell(error or f"not everything was recorded: {trouble}")
        except (ClientError, TimeoutError) as found:
            if trouble is None:
                return recorder.unrecorded(str(found) or f"{recorder.trouble} (waited {self._patience_s:g} s)")
        return trouble

    async def _tell(self, error: BaseException | str) -> None:
        """Has the run end as its block did. Twice does no more than once: the first end wins."""
        if isinstance(error, asyncio.CancelledError):
            why = f"its task was cancelled{f': {error}' if str(error) else ''}"
            await self._call("runs.cancel", {"run_id": self.id, "reason": cut(why, ERROR_BYTES)}, Cancelled)
        elif isinstance(error, KeyboardInterrupt):
            await self._call("runs.cancel", {"run_id": self.id, "reason": "interrupted from the keyboard"}, Cancelled)
        else:
            text = error if isinstance(error, str) else told(error)
            try:
                await self._call("runs.fail", {"run_id": self.id, "error": cut(text, ERROR_BYTES)})
            except CallError as refused:
                maximum = refused.data.get("maximum")
                if refused.data.get("limit") != "text_bytes" or not isinstance(maximum, int):
                    raise
                await self._call("runs.fail", {"run_id": self.id, "error": cut(text, maximum)})


def told(error: BaseException) -> str:
    """An exception as `Type: message`, without a traceback; of a group, those in it, too."""
    try:
        message = str(error).encode("utf-8", "replace").decode()
    except Exception:  # noqa: BLE001 - an exception that cannot be told is still one
        message = "(it has no message: that failed)"
    name = type(error).__name__
    text = f"{name}: {message}" if message else name
    if isinstance(error, BaseExceptionGroup):
        inner = error.exceptions[:_LEAVES]
        more = "; …" if len(error.exceptions) > len(inner) else ""
        text = f"{text}: {'; '.join(map(told, inner))}{more}"
    return text


def cut(text: str, size: int) -> str:
    """A text of at most so many bytes of UTF-8; one that is cut says so."""
    raw = text.encode()
    if len(raw) <= size:
        return text
    said = f"… (cut: {len(raw)} bytes in all)"
    return raw[: max(size - len(said.encode()), 0)].decode("utf-8", "ignore") + said
