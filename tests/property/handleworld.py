"""A loop, a clock, storage, hosts and peers of the test's own, around a real `HandleStore`: nothing moves by itself."""

import heapq
import itertools
import json
from asyncio import CancelledError
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator
from types import SimpleNamespace
from typing import Any, cast

from msgspec import Raw

from carserver.config import Settings
from carserver.core.commands import Command
from carserver.core.counters import Counters
from carserver.core.edits import Change, Edit, OpenHandle, Stored, UsedKey
from carserver.core.execution import Call, Feed
from carserver.core.handlestore import HandleStore
from carserver.core.outbox import Outbox
from carserver.core.outputs import Output
from carserver.core.outputstore import OutputStore
from carserver.core.ports import Committed, Done, Hooks, RunLog
from carserver.core.principals import Principal
from carserver.core.runs import Head
from carserver.core.runstore import RunStore
from carserver.core.toolbox import Toolbox
from carserver.core.toolrecord import Recorders
from carserver.core.toolstream import ToolStreams
from carserver.protocol.errors import RpcError
from carserver.protocol.tools import ErrorChunk, GivenDone, GivenTool, TextChunk, ToolStatus

TERMINAL = ("done", "error")


class Future:
    """Something that a task waits for, once."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.task: Task | None = None

    def end(self, value: Any = None, error: Exception | None = None) -> None:
        if not self.done:
            self.done, self.value, self.error = True, value, error
            if self.task is not None:
                self._loop.ready.append(self.task)

    def __await__(self) -> Generator["Future", None, Any]:
        if not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.value


class Task:
    """A coroutine on its way."""

    def __init__(self, loop: "Loop", work: Coroutine[Any, Any, Any]) -> None:
        self._loop = loop
        self._work = work
        self._waits_for: Future | None = None
        self._cancelled = False
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None
        loop.ready.append(self)

    def cancel(self) -> None:
        if not self.done:
            self._cancelled = True
            if self._waits_for is not None:
                self._waits_for.task = None
            self._loop.ready.append(self)

    def step(self) -> None:
        if self.done:
            return
        try:
            if self._cancelled:
                self._cancelled = False
                self._waits_for = self._work.throw(CancelledError())
            else:
                self._waits_for = self._work.send(None)
            self._waits_for.task = self
        except StopIteration as stop:
            self.done, self.value = True, stop.value
        except (Exception, CancelledError) as error:  # noqa: BLE001 - it is for the test to look at
            self.done, self.error = True, error


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Implements `core.runstore.Clock`; tasks run in `turn`, time passes in `passes`."""

    def __init__(self) -> None:
        self.s = 1_000.0
        self.ready: deque[Task] = deque()
        self.tasks: list[Task] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def now_ms(self) -> int:
        return round(self.s * 1000)

    def monotonic(self) -> float:
        return self.s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.s + delay_s, next(self._numbers), timer))
        return timer

    def spawn(self, work: Coroutine[Any, Any, Any]) -> Task:
        self.tasks = [task for task in self.tasks if not task.done]
        self.tasks.append(Task(self, work))
        return self.tasks[-1]

    @property
    def timers(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def turn(self) -> None:
        while self.ready:
            self.ready.popleft().step()

    def passes(self, seconds: float) -> None:
        until = self.s + seconds
        self.turn()
        while self._timers and self._timers[0][0] <= until:
            self.s, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
            self.turn()
        self.s = until


class Signal:
    """Implements `core.handles.Signal`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._future = Future(loop)

    def set(self) -> None:
        self._future.end(True)

    async def wait(self, timeout_s: float | None) -> bool:
        timer = None if timeout_s is None else self._loop.call_later(timeout_s, lambda: self._future.end(False))
        try:
            return bool(await self._future)
        finally:
            if timer is not None:
                timer.cancel()


class Storage:
    """Implements what is used here of `RunLog` and of `core.edits.Stored`; it answers when it is told to."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.asks: list[tuple[Command | Edit, Any, Future]] = []
        self.heads: dict[str, Head] = {}
        self.open_handles: set[str] = set()
        self.keys: dict[tuple[str, str, str], UsedKey] = {}
        self.publish: Callable[[list[Committed | Done]], None] = lambda _: None

    async def submit(self, command: Command, by: Any, *, patient: bool = False) -> Any:
        return await self._ask(command, by)

    async def edit(self, edit: Edit, by: Any = None, *, patient: bool = False) -> Any:
        return await self._ask(edit, by)

    async def _ask(self, change: Command | Edit, by: Any) -> Any:
        future = Future(self._loop)
        self.asks.append((change, by, future))
        return await future

    def commit(self, count: int) -> None:
        """The next changes, in one commit: published, then acknowledged."""
        taken, self.asks = self.asks[:count], self.asks[count:]
        committed: list[Committed | Done] = []
        answers: list[tuple[Future, Any, Exception | None]] = []
        for change, by, future in taken:
            before = (dict(self.heads), set(self.open_handles), dict(self.keys))
            try:
                if isinstance(change, Edit):
                    edited = change.edit(cast("Stored", self))
                    committed.append(Done(change, edited, by))
                    answers.append((future, edited.answer, None))
                else:
                    made = self.apply(change)
                    committed.append(Committed(change, made.applied, by, made.before))
                    answers.append((future, made.applied.answer, None))
            except Exception as refusal:  # noqa: BLE001 - as the writer has it
                self.heads, self.open_handles, self.keys = before
                answers.append((future, None, refusal))
        self.publish(committed)
        for future, answer, error in answers:
            future.end(answer, error)

    def refuse(self, error: Exception) -> None:
        self.asks.pop(0)[2].end(error=error)

    # core.edits.Stored: its runs and its handles.

    @property
    def runs(self) -> "Storage":
        return self

    @property
    def handles(self) -> "Storage":
        return self

    def head(self, run_id: str) -> Head | None:
        return self.heads.get(run_id)

    def apply(self, command: Command) -> Change:
        before = self.heads.get(command.run_id)
        applied = command.apply(before, None)
        self.heads[command.run_id] = applied.head
        return Change(command, applied, cast("Head", before))

    def open(self, row: OpenHandle) -> None:
        self.open_handles.add(row.handle)

    def close(self, handle: str) -> bool:
        found = handle in self.open_handles
        self.open_handles.discard(handle)
        return found

    def used_key(self, owner: str, method: str, key: str) -> UsedKey | None:
        return self.keys.get((owner, method, key))

    def use_key(self, used: UsedKey) -> None:
        self.keys[used[:3]] = used

    def forget_keys(self, before_ms: int) -> None:
        self.keys = {key: used for key, used in self.keys.items() if used.at_ms >= before_ms}


class Execution:
    """One tool that runs; implements `core.execution.Execution`."""

    def __init__(self, call: Call, feed: Feed) -> None:
        self.call = call
        self.feed = feed
        self.stops: list[str] = []
        self.said_last = False
        self.over = False  # gone, or not heard of any more

    def stop(self, reason: str) -> None:
        assert not self.over, "it was stopped after its end"
        self.stops.append(reason)

    def says(self, chunk: TextChunk | GivenDone | ErrorChunk) -> None:
        self.feed.take(chunk)
        self.said_last |= not isinstance(chunk, TextChunk)

    def ends(self, *, proved: bool) -> None:
        self.over = True
        if proved:
            self.feed.gone()
        else:
            self.feed.survives()


class ToolHostOfTests:
    """Implements `core.execution.ToolHost`."""

    def __init__(self) -> None:
        self.refusal: RpcError | None = None
        self.executions: list[Execution] = []

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        return self.refusal

    def start(self, call: Call, feed: Feed) -> Execution:
        self.executions.append(Execution(call, feed))
        return self.executions[-1]


class Caller:
    """A connection; implements `core.attendance.Attendant`."""

    def __init__(self, principal: Principal) -> None:
        self.client_id = ""
        self.hosting = None
        self.hosts_for_itself = False
        self.principal = principal
        self.closed = False
        self.outbox = Outbox(lambda payload: payload, 1 << 20, lambda: None)
        self.tasks: list[Task] = []


class World:
    """All of it together. It is told as hooks are, and follows the live stream of everyone's handles."""

    def __init__(self, settings: Settings) -> None:
        self.loop = loop = Loop()
        self.storage = Storage(loop)
        self.settings = settings
        self.counters = Counters()
        log = cast("RunLog", self.storage)
        self.runs = RunStore(log, loop, settings, self.counters)
        self.storage.publish = self.runs.committed
        self.toolbox = Toolbox(settings)
        self.recorders = Recorders(log, loop, settings, self.counters)
        self.streams = ToolStreams(loop.call_later, settings, self.counters)
        ids = (f"{number:032x}" for number in itertools.count())
        self.tools = HandleStore(
            self.runs,
            cast("OutputStore", self),
            self.toolbox,
            self.recorders,
            self.streams,
            loop,
            settings,
            self.counters,
            lambda: next(ids),
            lambda: Signal(loop),
            cast("Hooks", self),
        )
        self.host = ToolHostOfTests()
        self.executions: list[Execution] = []  # of the hosts that were
        self.callers: list[Caller] = []
        self.started: list[str] = []
        self.ended: Counter[str] = Counter()
        self.chunks: dict[str, list[dict[str, Any]]] = {}
        self.saving: list[Future] = []
        self.output = SimpleNamespace(record=SimpleNamespace(id="out-1"))
        self.viewer = Outbox(lambda payload: payload + b"\n", 1 << 30, lambda: None)
        stream = self.streams.open(self.viewer, Principal("host"))
        self.streams.follow(stream, None)
        self.streams.activate(stream, None)
        self.stream = stream
        self.register()

    def register(self) -> None:
        self.toolbox.register(self.host, [self.toolbox.define(GivenTool(name="tool"), 0)])

    def all_executions(self) -> list[Execution]:
        return self.executions + self.host.executions

    def settle(self) -> None:
        """All that can happen now does."""
        self.loop.passes(0.0)
        while taken := self.viewer.take(1 << 20):
            for line in taken.splitlines():
                params = json.loads(line)["params"]
                chunks = self.chunks.setdefault(params["handle"], [])
                assert params["sequence"] == len(chunks), "the stream has all, in order"
                assert not any(chunk["kind"] in TERMINAL for chunk in chunks), "nothing comes after the last"
                chunks.append(params["chunk"])
            self.loop.passes(0.0)

    # OutputStore.

    async def keep_result(self, owner: Principal, handle: str, tool: str, value: Raw, run_id: str | None) -> Output:
        future = Future(self.loop)
        self.saving.append(future)
        return cast("Output", await future)

    # Hooks.

    def tool_started(self, handle: str, tool: str, run_id: str) -> None:
        self.started.append(handle)

    def tool_ended(self, handle: str, tool: str, status: ToolStatus, run_id: str) -> None:
        assert handle in self.started
        self.ended[handle] += 1
