"""Callers, hosts, runs, storage and time in any order, around a real `HandleStore`, `Toolbox`, `Recorders` and streams.

Safety: an idempotency key starts one execution; what runs has a live handle, or was stopped; who waits for a handle is
who may; the stream of each ends once, and nothing is said of one that never came to be. Liveness: every request is
answered, every handle ends once nobody is there, and then nothing of any of it is left.
"""

from asyncio import CancelledError
from typing import Any, cast

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core.commands import Cancel, Command
from carserver.core.handlestore import Order
from carserver.core.ports import Committed
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.protocol.errors import ErrorKind, RpcError, overloaded, unavailable
from carserver.protocol.tools import ErrorChunk, GivenDone, TextChunk
from tests.property.handleworld import TERMINAL, Caller, Execution, Task, ToolHostOfTests, World
from tests.unit.storing import create, event, record

SETTINGS = Settings(
    handles=4, grace_s=30.0, storage_s=25.0, finished_s=900.0, finished_handles=3, result_inline_bytes=40, delta_s=0.05
)
AGENT = Principal("agent", "a")
RUNS = {"run-1": CLIENT, "run-2": CLIENT, "run-3": AGENT}
DEFECT = "a defect"
places = st.integers(0, 7)
mostly = st.sampled_from([True, True, True, False])
keys = st.sampled_from(["k1", "k2"])


class Made:
    """A request that was sent: by whom, and what it was answered."""

    def __init__(self, caller: Caller, order: Order) -> None:
        self.caller = caller
        self.order = order
        self.task: Task


class Steps(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(SETTINGS)
        self.made: list[Made] = []
        self.waits: list[tuple[Task, float]] = []  # other requests, and when they are to be answered at the latest
        self.known: list[str] = []  # handles that somebody was told
        for run_id, owner in RUNS.items():
            self.now(create(run_id, owner=owner))
        for principal in (CLIENT, CLIENT, AGENT, HOST):
            self.world.callers.append(Caller(principal))

    def now(self, command: Command) -> None:
        """A change that is durable at once."""
        change = self.world.storage.apply(command)
        self.world.runs.committed([Committed(command, change.applied, None, change.before)])

    def caller(self, place: int) -> Caller:
        return self.world.callers[place % len(self.world.callers)]

    def running(self) -> list[Execution]:
        return [execution for execution in self.world.host.executions if not execution.over]

    # Callers.

    @rule(place=places, waits=st.booleans(), timeout_ms=st.sampled_from([None, None, 5_000]))
    def invokes(self, place: int, waits: bool, timeout_ms: int | None) -> None:
        self.invoke(place, None, None, waits, timeout_ms)

    @rule(place=places, waits=st.booleans(), key=keys, stored=mostly)
    def invokes_with_a_key(self, place: int, waits: bool, key: str, stored: bool) -> None:
        self.invoke(place, key, None, waits, None)
        self.commits(9 * stored)

    @rule(place=places, waits=st.booleans(), key=keys | st.none(), run=st.sampled_from([*RUNS]), stored=mostly)
    def invokes_in_a_run(self, place: int, waits: bool, key: str | None, run: str, stored: bool) -> None:
        own = [place for place, caller in enumerate(self.world.callers) if caller.principal == RUNS[run]]
        self.invoke(own[place % len(own)] if stored else place, key, run, waits, None)
        self.commits(9 * stored)

    def invoke(self, place: int, key: str | None, run_id: str | None, waits: bool, timeout_ms: int | None) -> None:
        caller = self.caller(place)
        name = "tools.call" if waits else "tools.invoke"
        action_id = f"{name} {key} {run_id}" if key else f"a{len(self.made)}"
        order = Order(name, "tool", UNSET, action_id, run_id, timeout_ms, key)
        made = Made(caller, order)
        tools = self.world.tools
        work = tools.call if waits else tools.invoke
        made.task = self.world.loop.spawn(work(order, caller.principal, caller))
        caller.tasks.append(made.task)
        self.made.append(made)
        self.world.settle()

    def some_handle(self, place: int) -> str:
        live = [life for lives in self.world.tools._live.values() for life in lives]
        ids = [*live, *self.known[-4:]] or ["unknown"]
        return ids[place % len(ids)]

    @rule(
        place=places, which=places, wait_ms=st.sampled_from([0, 10_000]), after=st.sampled_from([None, None, 0, 1, 9])
    )
    def polls(self, place: int, which: int, wait_ms: int, after: int | None) -> None:
        caller, handle = self.caller(place), self.some_handle(which)
        seen = self.world.tools.find(handle, caller.principal)
        assert seen is None or caller.principal.role == "host" or seen.owner == caller.principal.name
        size = 0 if seen is None else seen.size
        task = self.world.loop.spawn(self.world.tools.poll(handle, caller.principal, caller, wait_ms, after))
        caller.tasks.append(task)
        self.waits.append((task, self.world.loop.s + wait_ms / 1000))
        self.world.settle()
        if seen is None:
            assert task.done
            assert task.value is None
        elif seen.owner != caller.principal.name:
            assert seen.size == size, "the host takes nothing"
            assert handle in self.world.tools._lives

    @rule(place=places, which=places, wait_ms=st.sampled_from([0, 10_000]))
    def cancels(self, place: int, which: int, wait_ms: int) -> None:
        caller, handle = self.caller(place), self.some_handle(which)
        seen = self.world.tools.find(handle, caller.principal)
        task = self.world.loop.spawn(self.world.tools.cancel(handle, caller.principal, wait_ms))
        caller.tasks.append(task)
        self.waits.append((task, self.world.loop.s + wait_ms / 1000))
        self.world.settle()
        if seen is not None:
            assert seen.ended, "it is sealed at once"

    @rule(place=places)
    def cancels_all(self, place: int) -> None:
        caller = self.caller(place)
        live = list(self.world.tools.live_of(caller.principal))
        assert self.world.tools.cancel_all(caller.principal, "not needed") >= len(live)
        self.world.settle()
        assert all(handle.ended for handle in live)
        assert not list(self.world.tools.live_of(caller.principal))

    @rule(place=places)
    def goes(self, place: int) -> None:
        """A connection ends, in the order of `Session.close`; another comes for it."""
        caller = self.caller(place)
        caller.closed = True
        self.world.runs.attendance.leave(caller)
        self.world.tools.callers.leave(caller)
        for task in caller.tasks:
            task.cancel()
        self.world.settle()
        assert all(task.done for task in caller.tasks)
        self.world.callers[self.world.callers.index(caller)] = Caller(caller.principal)

    # Hosts.

    @precondition(lambda self: self.running())
    @rule(which=places, stored=st.booleans())
    def ends_with_a_large_result(self, which: int, stored: bool) -> None:
        execution = self.running()[which % len(self.running())]
        execution.says(GivenDone(result=Raw(b'"%b"' % (b"x" * 60))))
        execution.ends(proved=True)
        self.world.settle()
        if stored and self.world.saving:
            self.result_is_stored(None)

    @precondition(lambda self: self.running())
    @rule(which=places, what=st.sampled_from(["text", "text", "done", "error", "answer", "survives"]))
    def says(self, which: int, what: str) -> None:
        running = self.running()
        execution = running[which % len(running)]
        match what:
            case "text":
                execution.says(TextChunk(text="t"))
            case "done":
                execution.says(GivenDone(result=Raw(b"1")))
            case "error":
                execution.says(ErrorChunk(message="broken"))
            case _:
                execution.ends(proved=what == "answer")
        self.world.settle()

    @rule()
    def host_goes(self) -> None:
        gone = self.world.host
        gone.refusal = unavailable("the host's connection ended")
        self.world.toolbox.drop(gone)
        for execution in self.running():
            execution.feed.close("the host's connection ended")
            execution.ends(proved=False)
        self.world.executions += gone.executions
        self.world.host = ToolHostOfTests()
        self.world.register()
        self.world.settle()

    @rule(refusal=st.sampled_from([None, overloaded("it is busy", 1_000)]))
    def host_refuses(self, refusal: RpcError | None) -> None:
        self.world.host.refusal = refusal

    # Storage, runs, time.

    @precondition(lambda self: self.world.storage.asks)
    @rule(count=st.integers(1, 5))
    def commits(self, count: int) -> None:
        self.world.storage.commit(count)
        self.world.settle()

    @precondition(lambda self: self.world.storage.asks)
    @rule(error=st.sampled_from([unavailable("full"), overloaded("too much", 1_000), ValueError(DEFECT)]))
    def refuses(self, error: Exception) -> None:
        if isinstance(error, ValueError) and not hasattr(self.world.storage.asks[0][0], "key_ms"):
            return  # of a recorder, a defect is for the log
        self.world.storage.refuse(error)
        self.world.settle()

    @precondition(lambda self: self.world.saving)
    @rule(error=st.sampled_from([None, unavailable("full"), ValueError(DEFECT)]))
    def result_is_stored(self, error: Exception | None) -> None:
        self.world.saving.pop(0).end(self.world.output, error)
        self.world.settle()

    @rule(run_id=st.sampled_from([*RUNS]), how=st.sampled_from(["cancel", "complete", "same commit"]))
    def run_ends(self, run_id: str, how: str) -> None:
        owner = RUNS[run_id]
        cancel = Cancel(run_id=run_id, principal=owner, now_ms=self.world.loop.now_ms(), reason="enough")
        if how == "complete":
            self.now(record(run_id, event(0, type_="agent_end"), by=owner))
        elif how == "cancel":
            self.now(cancel)
        else:
            self.world.loop.spawn(self.world.storage.submit(cancel, None))
        self.world.settle()

    @rule(run_id=st.sampled_from([*RUNS]))
    def a_tool_runs_in_another_run_which_ends(self, run_id: str) -> None:
        """One of the same name, for short."""
        if not self.world.storage.heads[run_id].live:
            del self.world.storage.heads[run_id]
            self.now(create(run_id, owner=RUNS[run_id]))
        self.world.host.refusal = None
        self.invokes_in_a_run(0, False, None, run_id, True)
        self.run_ends(run_id, "cancel")

    @rule(seconds=st.sampled_from([0.1, 0.1, 5.0, 11.0, 26.0, 31.0]) | st.just(901.0))
    def passes(self, seconds: float) -> None:
        self.world.loop.passes(seconds)
        self.world.settle()

    # What holds at any time.

    @invariant()
    def a_key_starts_one_execution(self) -> None:
        keyed = [
            (execution.feed.handle.owner, *execution.call.action_id.split()[:2])  # type: ignore[attr-defined]
            for execution in self.world.all_executions()
            if execution.call.action_id.startswith("tools.")
        ]
        assert len(keyed) == len(set(keyed))

    @invariant()
    def what_runs_has_a_live_handle_or_was_stopped_once(self) -> None:
        live = {handle for lives in self.world.tools._live.values() for handle in lives}
        unwatched = {
            made.order.action_id
            for made in self.made
            if made.order.key is None and made.caller.closed and made.order.method == "tools.call"
        }
        for execution in self.world.all_executions():
            assert len(execution.stops) <= 1
            if not (execution.over or execution.said_last or execution.stops):
                assert execution.call.handle in live
                assert execution.call.action_id not in unwatched, "it outlives its caller"
                head = self.world.storage.heads.get(execution.call.run_id or "")
                assert head is None or head.live or head.run.status == "completed", "it outlives its run"
        assert self.world.tools.running == sum(not execution.over for execution in self.world.all_executions())

    @invariant()
    def every_request_is_answered_in_time_and_only_refused_in_words(self) -> None:
        for made in self.made:
            task = made.task
            if task.done and not made.caller.closed:
                if task.error is not None:
                    assert isinstance(task.error, RpcError) or str(task.error) == DEFECT
                    if isinstance(task.error, RpcError) and task.error.data.get("reason") == "exists":
                        assert task.error.data["handle"] not in self.world.tools._lives
                else:
                    self.tell(task.value.id)
                    assert task.value.ended or made.order.method == "tools.invoke"
        for task, due_s in self.waits:
            assert task.done or self.world.loop.s < due_s
            assert task.error is None or not isinstance(task.error, Exception) or self.is_bad_after(task.error)
        self.waits = [(task, due_s) for task, due_s in self.waits if not task.done]

    @staticmethod
    def is_bad_after(error: Exception) -> bool:
        return isinstance(error, RpcError) and error.kind is ErrorKind.INVALID_PARAMS

    def tell(self, handle: str) -> None:
        if handle not in self.known:
            self.known.append(handle)

    @invariant()
    def the_bounds_hold_and_containers_agree(self) -> None:
        tools = self.world.tools
        for owner, lives in tools._live.items():
            assert 0 < len(lives) <= SETTINGS.handles
            assert all(life.handle.owner == owner and not life.handle.ended for life in lives.values())
        for by, lives in tools.callers._invoked.items():
            assert not cast("Caller", by).closed
            assert lives
            assert all(by in life.handle.invokers and not life.handle.ended for life in lives.values())
        storing = [life for lives in tools._live.values() for life in lives.values() if life.handle.state.over]
        assert len(storing) <= len(self.world.saving), "what storage has answered has ended"
        finished = {handle for kept in tools.finished._owners.values() for handle in kept.handles}
        known = {life.handle for life in tools._lives.values()}
        assert finished == {handle for handle in known if handle.ended}
        assert all(len(kept.handles) <= SETTINGS.finished_handles for kept in tools.finished._owners.values())
        for kept in tools.finished._owners.values():
            assert kept.bytes == sum(handle.size for handle in kept.handles)
        assert {handle: key for key, (_, handle) in tools._keys.items()} == tools._key_of
        assert set(tools._key_of) <= set(tools._lives)

    @invariant()
    def nothing_is_said_of_what_never_came_to_be_and_each_ends_once(self) -> None:
        world = self.world
        assert set(world.chunks) <= set(world.started)
        assert len(world.started) == len(set(world.started)) == world.counters.handles_started
        for handle, chunks in world.chunks.items():
            ends = [chunk for chunk in chunks if chunk["kind"] in TERMINAL]
            assert len(ends) == world.ended[handle]
        ended = world.counters.handles_succeeded + world.counters.handles_failed + world.counters.handles_cancelled
        assert ended == sum(world.ended.values())

    # In the end.

    def teardown(self) -> None:
        world = self.world
        for place in range(len(world.callers)):
            self.goes(place)
        for _ in range(6):  # an append follows the other; a run that nobody attends is interrupted
            while world.storage.asks:
                world.storage.commit(100)
                world.settle()
            while world.saving:
                world.saving.pop(0).end(world.output)
            self.passes(31.0)
        for execution in self.running():
            assert execution.stops or execution.said_last, "nobody wants it, and it was not stopped"
            execution.ends(proved=True)
        world.settle()
        self.what_runs_has_a_live_handle_or_was_stopped_once()
        while world.storage.asks:
            world.storage.commit(100)
            self.passes(1.0)
        assert set(world.ended) == set(world.started)
        assert not world.storage.open_handles
        assert not len(world.recorders)
        self.passes(901.0)
        world.toolbox.drop(world.host)
        world.streams.drop(world.stream)
        tools: Any = world.tools
        for left in (tools._lives, tools._live, tools._of_runs, tools.callers._invoked, tools._openings, tools._keys):
            assert not left
        assert not tools._key_of
        assert not tools._stopping
        assert not tools.finished._owners
        assert tools.live == tools.running == 0
        streams: Any = world.streams
        for left in (streams._streams, streams._of_handle, streams._of_owner):
            assert not left
        assert not world.toolbox._entries
        assert not world.toolbox._hosted
        assert world.toolbox.size == 0
        assert all(task.done for task in world.loop.tasks)
        assert world.loop.timers == 0
        for task in world.loop.tasks:
            assert task.error is None or isinstance(task.error, RpcError | CancelledError) or str(task.error) == DEFECT


Steps.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyHandles = Steps.TestCase
