"""Hooks: what is installed beside carserver and wants to be told of runs and tools (contract, section 9).

An entry point of the group `carserver.hooks` names a module, an object, or a class, which is made without arguments.
It has any of these functions, plain or `async def`; the arguments come by place, each a string:

    run_created(run_id, session_id)
    run_cancelled(run_id, session_id, reason)
    run_ended(run_id, session_id, status)    # completed, failed, cancelled or interrupted
    tool_started(handle, tool, run_id)       # run_id is empty where the tool is part of no run
    tool_ended(handle, tool, status, run_id)    # succeeded, failed or cancelled

Of runs they are told what is durable, in the order of the commits, one call at a time for each hook. A run that is
cancelled gives `run_cancelled`, then `run_ended`; one that is interrupted and goes on ends again; an import is told of
nowhere. What waits when the daemon is killed is not told later.

Of a tool they are told when its handle starts and when it is sealed; what a run that ends takes along, before that end.
A daemon tells of its own handles only, and no handle outlives it: one that was killed with tools running ended them,
and the next tells of none of them, though it closes those that were part of a run in its log.

A hook runs in a thread of the daemon's process, never on its loop. A call that takes longer than `hook_s` is given up:
what is `async` is cancelled, what is not goes on hanging in its thread, beside the calls that follow. What a hook
raises is logged. Nothing that it does reaches a peer, or another hook.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from inspect import isawaitable
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.protocol.runs import Status
from carserver.protocol.tools import ToolStatus

log = logging.getLogger("carserver.hooks")

GROUP: Final = "carserver.hooks"
FUNCTIONS: Final = ("run_created", "run_cancelled", "run_ended", "tool_started", "tool_ended")
_LOG_PAUSE_S: Final = 1.0  # between two lines about the same trouble

Done = Callable[[Any], None]


class Call(NamedTuple):
    """What a hook is to be told: the name of its function, and the arguments."""

    function: str
    arguments: tuple[str, ...]

    @property
    def size(self) -> int:
        """About how many bytes it keeps while it waits."""
        return 256 + sum(map(len, self.arguments))


class Waiting:
    """The calls that wait for one hook; bounded, and what does not fit is counted, said and left out."""

    def __init__(self, name: str, settings: Settings, counters: Counters) -> None:
        self._settings = settings
        self._counters = counters
        self._calls: deque[Call] = deque()
        self._bytes = 0
        self._complaint = Complaint(f"{name}: more waits than hook_queue allows, so some is not told")

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, call: Call) -> None:
        """One more."""
        if self._calls and (
            len(self._calls) >= self._settings.hook_queue or self._bytes + call.size > self._settings.hook_queue_bytes
        ):
            self._counters.hook_overflows += 1
            self._complaint.log()
            return
        self._calls.append(call)
        self._bytes += call.size

    def take(self) -> Call:
        """The one that has waited longest."""
        call = self._calls.popleft()
        self._bytes -= call.size
        return call


class Complaint:
    """A line of the log that comes at most once a second, however often there is a reason for it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._unsaid = 0
        self._next_s = 0.0

    def log(self, error: BaseException | None = None) -> None:
        """Says it, or that it was not said."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_s:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} times since that was said last)" if self._unsaid else ""
        log.warning("%s%s", self._what, more, exc_info=error)
        self._unsaid = 0
        self._next_s = now_s + _LOG_PAUSE_S


class Caller:
    """A thread in which a hook is called. The daemon never waits for it, and its end does not either."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Done] | None] = SimpleQueue()
        self._runner = asyncio.Runner()  # its loop is made when the first awaitable is there, and kept for the next
        self._task: asyncio.Task[Any] | None = None
        self._left = False
        threading.Thread(target=self._run, name="hook", daemon=True).start()

    def do(self, work: Callable[[], Any], done: Done) -> None:
        """Does `work` in the thread; `done` gets its result or what it raised, on the daemon's loop."""
        self._jobs.put((work, done))

    def leave(self) -> None:
        """It is not wanted any more: it ends after what it does now, which is cancelled if it can be."""
        self._left = True
        if (task := self._task) is not None:
            with contextlib.suppress(RuntimeError):  # it came to its end by itself
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            try:
                result = work()
                if isawaitable(result):
                    result = self._runner.run(self._awaited(result))
            except BaseException as error:  # noqa: BLE001 - of somebody else's code, SystemExit included
                result = error
            with contextlib.suppress(RuntimeError):  # the daemon has ended
                self._loop.call_soon_threadsafe(done, result)
        self._runner.close()

    async def _awaited(self, result: Any) -> Any:
        self._task = task = asyncio.current_task()
        if self._left and task is not None:
            task.cancel()  # it has taken its time before it came to wait
        try:
            return await result
        finally:
            self._task = None


class Hook:
    """One entry point: what waits for it, and the thread that calls it.

    Args:
        entry_point: What was found; it is loaded in the thread.
        loop: The daemon's; everything here but the calls runs on it.
        settings: `hook_s`, `hook_hanging`, `hook_queue`, `hook_queue_bytes`.
        counters: What is counted.
    """

    def __init__(
        self, entry_point: EntryPoint, loop: asyncio.AbstractEventLoop, settings: Settings, counters: Counters
    ) -> None:
        self.name = f"hook {entry_point.name} ({entry_point.value})"
        self.hanging = 0  # calls that were given up and have not come back
        self._loop = loop
        self._settings = settings
        self._counters = counters
        self._waiting = Waiting(self.name, settings, counters)
        self._functions: dict[str, Callable[..., Any]] | None = None  # None until it is loaded
        self._failures = {name: Complaint(f"{self.name}: {name} failed") for name in FUNCTIONS}
        self._caller: Caller | None = Caller(loop)
        self._under_way: asyncio.TimerHandle | None = loop.call_later(settings.hook_s, self._loads_long)
        self._caller.do(partial(_load, entry_point), self._loaded)

    @property
    def waiting(self) -> int:
        """How many calls wait, or are being made."""
        return len(self._waiting) + (self._under_way is not None and self._functions is not None)

    @property
    def idle(self) -> bool:
        """Whether it has been told everything."""
        return not self.waiting

    def tell(self, call: Call) -> None:
        """One more call, if it has that function."""
        if self._functions is None or call.function in self._functions:
            self._waiting.put(call)
            self._go_on()

    def close(self) -> None:
        """The daemon ends: what waits is left."""
        if self.waiting:
            log.warning("%s: %d calls are left undone", self.name, self.waiting)
        if self._under_way is not None:
            self._under_way.cancel()
        if self._caller is not None:
            self._caller.leave()

    def _loads_long(self) -> None:
        log.warning("%s is still being loaded after hook_s (%g)", self.name, self._settings.hook_s)

    def _loaded(self, functions: dict[str, Callable[..., Any]] | BaseException) -> None:
        self._end_call()
        if isinstance(functions, BaseException):
            log.warning("%s cannot be loaded", self.name, exc_info=functions)
            functions = {}
        self._functions = functions
        self._go_on()

    def _go_on(self) -> None:
        """Makes the next call, if it is time."""
        while self._waiting and self._under_way is None and self._functions is not None:
            if self._caller is None:
                if self.hanging >= self._settings.hook_hanging:
                    return
                self._caller = Caller(self._loop)
            call = self._waiting.take()
            if call.function in self._functions:
                self._call(self._caller, call, self._functions[call.function])

    def _call(self, caller: Caller, call: Call, function: Callable[..., Any]) -> None:
        self._counters.hook_calls += 1
        self._under_way = self._loop.call_later(self._settings.hook_s, self._give_up, call)
        caller.do(partial(function, *call.arguments), partial(self._called, caller, call))

    def _called(self, caller: Caller, call: Call, result: Any) -> None:
        if caller is not self._caller:
            self.hanging -= 1  # given up before; how it ended does not matter any more
        else:
            self._end_call()
            if isinstance(result, BaseException):
                self._counters.hook_failures += 1
                self._failures[call.function].log(result)
        self._go_on()

    def _give_up(self, call: Call) -> None:
        self._counters.hook_timeouts += 1
        self.hanging += 1
        rests = "; it rests until one of its calls comes back" if self.hanging == self._settings.hook_hanging else ""
        seconds = self._settings.hook_s
        log.warning("%s: %s took longer than hook_s (%g) and was given up%s", self.name, call.function, seconds, rests)
        self._end_call()
        if self._caller is not None:
            self._caller.leave()
            self._caller = None
        self._go_on()

    def _end_call(self) -> None:
        if self._under_way is not None:
            self._under_way.cancel()
            self._under_way = None


class InstalledHooks:
    """Implements `core.ports.Hooks` with what is installed. Before `start`, and where nothing is, it does nothing."""

    def __init__(self, settings: Settings, counters: Counters) -> None:
        self._settings = settings
        self._counters = counters
        self._early: Waiting | None = None  # what is to be told while it is not known yet to whom
        self._hooks: list[Hook] = []

    @property
    def idle(self) -> bool:
        """Whether everyone has been told everything."""
        return not self._early and all(hook.idle for hook in self._hooks)

    @property
    def waiting(self) -> int:
        """Calls that wait or are being made, for all hooks together."""
        return len(self._early or ()) + sum(hook.waiting for hook in self._hooks)

    @property
    def hanging(self) -> int:
        """Calls that were given up and go on."""
        return sum(hook.hanging for hook in self._hooks)

    def start(self) -> None:
        """Looks for hooks; in a thread, for it reads a file of everything that is installed."""
        self._early = Waiting("hooks", self._settings, self._counters)
        loop = asyncio.get_running_loop()
        finder = Caller(loop)
        finder.do(partial(entry_points, group=GROUP), partial(self._found, loop))
        finder.leave()

    def _found(self, loop: asyncio.AbstractEventLoop, found: Sequence[EntryPoint] | BaseException) -> None:
        early, self._early = self._early, None
        if isinstance(found, BaseException):
            log.warning("what is installed cannot be read, so no hook is called", exc_info=found)
            return
        self._hooks = [Hook(entry_point, loop, self._settings, self._counters) for entry_point in found]
        while early:
            self._tell(early.take())

    def _tell(self, call: Call) -> None:
        if self._early is not None:
            self._early.put(call)
        for hook in self._hooks:
            hook.tell(call)

    def run_created(self, run_id: str, session_id: str) -> None:
        """See `core.ports.Hooks`."""
        self._tell(Call("run_created", (run_id, session_id)))

    def run_cancelled(self, run_id: str, session_id: str, reason: str) -> None:
        """See `core.ports.Hooks`."""
        self._tell(Call("run_cancelled", (run_id, session_id, reason)))

    def run_ended(self, run_id: str, session_id: str, status: Status) -> None:
        """See `core.ports.Hooks`."""
        self._tell(Call("run_ended", (run_id, session_id, status.value)))

    def tool_started(self, handle: str, tool: str, run_id: str) -> None:
        """See `core.ports.Hooks`."""
        self._tell(Call("tool_started", (handle, tool, run_id)))

    def tool_ended(self, handle: str, tool: str, status: ToolStatus, run_id: str) -> None:
        """See `core.ports.Hooks`."""
        self._tell(Call("tool_ended", (handle, tool, status.value, run_id)))

    def close(self) -> None:
        """The daemon ends: what waits is left, and the log says how much."""
        for hook in self._hooks:
            hook.close()
        if self._early:
            log.warning("hooks: %d calls are left undone", len(self._early))
        self._early, self._hooks = None, []


def _load(entry_point: EntryPoint) -> dict[str, Callable[..., Any]]:
    """The functions of a hook, by their names.

    Raises:
        TypeError: it has none.
    """
    loaded = entry_point.load()
    if isinstance(loaded, type):
        loaded = loaded()
    functions = {name: function for name in FUNCTIONS if callable(function := getattr(loaded, name, None))}
    if not functions:
        raise TypeError(f"{loaded!r} has none of {', '.join(FUNCTIONS)}")
    return functions
