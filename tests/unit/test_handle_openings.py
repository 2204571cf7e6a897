"""What becomes of invocations on their way to storage, and of handles that nobody is connected for."""

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core.handlestore import Order
from carserver.core.ports import Committed
from carserver.core.principals import CLIENT
from carserver.protocol.errors import ErrorKind, RpcError, unavailable
from carserver.protocol.tools import GivenDone
from tests.property.handleworld import Caller, Task, World
from tests.rig import Rig, rigged
from tests.unit.storing import create

MIB = 1024 * 1024
SETTINGS = Settings(storage_s=25, grace_s=30)


def order(*, key: str | None = None, run_id: str | None = None) -> Order:
    return Order("tools.invoke", "tool", UNSET, "", run_id, None, key)


def world_with_a_run() -> World:
    world = World(SETTINGS)
    change = world.storage.apply(create("run"))
    world.runs.committed([Committed(change.command, change.applied, None, change.before)])
    return world


def invoked(world: World, given: Order, by: Caller) -> Task:
    task = world.loop.spawn(world.tools.invoke(given, CLIENT, by))
    world.settle()
    return task


def test_where_storage_is_late_nothing_runs_the_handle_says_why_and_it_is_counted() -> None:
    world, caller = world_with_a_run(), Caller(CLIENT)
    task = invoked(world, order(run_id="run"), caller)
    world.loop.passes(25.0)
    assert isinstance(task.error, RpcError)
    assert task.error.kind is ErrorKind.DEADLINE_EXCEEDED
    assert world.counters.storage_deadlines == 1
    assert not world.started
    assert not world.chunks
    world.storage.commit(1)
    world.settle()
    assert not world.all_executions()
    assert list(world.chunks.values()) == [[{"kind": "error", "message": "storage did not answer in time"}]]
    assert world.counters.handles_started == world.counters.handles_cancelled == 1


def test_of_an_invocation_that_storage_refuses_nobody_hears_anything_even_if_it_was_called_off() -> None:
    world, caller = world_with_a_run(), Caller(CLIENT)
    task = invoked(world, order(run_id="run"), caller)
    assert world.tools.cancel_all(CLIENT, "not needed") == 1
    assert world.tools.cancel_all(CLIENT, "not needed") == 0
    world.storage.refuse(unavailable("full"))
    world.settle()
    assert isinstance(task.error, RpcError)
    assert not world.chunks
    assert world.counters.handles_cancelled == world.tools.live == 0


def test_however_often_callers_come_and_go_one_timer_looks_after_the_handle() -> None:
    world = World(SETTINGS)
    before = world.loop.timers
    for _ in range(20):
        caller = Caller(CLIENT)
        task = invoked(world, order(key="k"), caller)
        if world.storage.asks:
            world.storage.commit(1)
            world.settle()
        assert task.done
        caller.closed = True
        world.tools.callers.leave(caller)
    assert world.loop.timers == before + 1
    world.loop.passes(29.0)
    assert not world.host.executions[0].stops
    world.loop.passes(1.0)
    assert len(world.host.executions[0].stops) == 1


def test_a_large_result_that_cannot_be_stored_for_a_defect_fails_its_handle() -> None:
    world = World(SETTINGS)
    task = invoked(world, order(), Caller(CLIENT))
    world.host.executions[0].says(GivenDone(result=Raw(b'"%b"' % (b"x" * SETTINGS.result_inline_bytes))))
    world.settle()
    assert not task.value.ended
    world.saving.pop().end(error=ValueError("secret"))
    world.settle()
    assert task.value.status == "failed"
    assert task.value.error.endswith("could not be stored: a defect of the daemon; its log has the details")
    assert [str(task.error) for task in world.loop.tasks if task.error] == ["secret"], "it is said where all are"


def test_the_exit_code_of_a_command_is_recorded_beside_its_large_result() -> None:
    world, ended = world_with_a_run(), []
    task = invoked(world, order(run_id="run"), Caller(CLIENT))
    world.storage.commit(1)
    world.settle()

    class Recording:
        def text(self, text: str) -> None: ...

        def end(self, *said: Any) -> None:
            ended.append(said)

    life = world.tools._lives[task.value.id]
    life.record(Recording())
    life.take(GivenDone(result=Raw(b'"%b"' % (b"x" * SETTINGS.result_inline_bytes))), 3)
    world.settle()
    world.saving.pop().end(world.output)
    world.settle()
    ((output, exit_code, error, result_ref),) = ended
    assert (output, exit_code, error, result_ref.id) == ("", 3, None, "out-1")


def says(rig: Rig, method: str, params: Any) -> None:
    rig.daemon.front.dispatcher.receive(
        rig.session, json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    )


def sent(rig: Rig) -> list[Any]:
    frames = []
    while rig.outbox.size:
        frames.append(json.loads(rig.outbox.take(1)))
    return frames


def test_a_call_that_was_read_before_the_drain_and_begins_after_it_is_refused(tmp_path: Path) -> None:
    with rigged(tmp_path) as (rig, runner):

        async def go() -> list[Any]:
            says(rig, "tools.register", [{"name": "tool"}])
            says(rig, "tools.call", {"tool": "tool"})
            rig.daemon.draining = True
            await asyncio.wait(rig.connection.tasks)
            return sent(rig)

        registered, refused = runner.run(go())
        assert registered["result"] == 1
        assert refused["error"]["data"]["type"] == "unavailable"
        assert rig.daemon.counters.handles_started == rig.session.waiting == 0


def test_a_call_that_lasts_does_not_keep_what_it_was_called_with(tmp_path: Path) -> None:
    with rigged(tmp_path, outbox_bytes=64 * MIB) as (rig, runner):

        async def go() -> int:
            says(rig, "tools.register", [{"name": "tool"}])
            tracemalloc.start()
            for _ in range(4):
                says(rig, "tools.call", {"tool": "tool", "parameters": {"text": "x" * 4 * MIB}})
                await asyncio.sleep(0)
            assert sum(frame.get("method") == "tools.execute" for frame in sent(rig)) == 4
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return kept

        assert runner.run(go()) < 4 * MIB
        assert rig.session.waiting == 4
