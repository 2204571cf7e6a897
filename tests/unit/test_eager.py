"""Coroutines that are started in place, and methods that wait: what is left of them goes on in a task."""

import asyncio
import gc
import inspect
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from carserver.rpc import eager
from carserver.rpc.dispatcher import Dispatcher
from carserver.rpc.method import Table, method
from carserver.rpc.session import Session
from tests.methods_for_tests import get_data
from tests.rig import Rig, rigged


class Refusal(Exception):
    """What the work of a test raises."""


class Gate:
    """What the work of a test waits for, and what it did."""

    def __init__(self) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self.did: list[str] = []

    async def passed(self, name: str = "work") -> str:
        """Says what becomes of it."""
        self.did.append(f"{name} began")
        try:
            said: str = await self.opened
        except BaseException as error:
            self.did.append(f"{name} saw {type(error).__name__}")
            raise
        else:
            self.did.append(f"{name} went on")
            return said
        finally:
            self.did.append(f"{name} ended")


def pending(work: Coroutine[Any, Any, Any]) -> eager.Pending:
    """Starts what has to wait."""
    started = eager.start(work)
    assert isinstance(started, eager.Pending)
    return started


def going_on(work: eager.Pending) -> "asyncio.Task[Any]":
    """A task that awaits the rest."""

    async def rest() -> Any:
        return await work.rest()

    return asyncio.create_task(rest())


# What never waits.


async def test_what_never_waits_gives_its_result_at_once() -> None:
    async def work() -> str:
        return "done"

    assert eager.start(work()) == "done"


async def test_what_awaits_only_what_is_there_already_gives_its_result_at_once() -> None:
    gate = Gate()
    gate.opened.set_result("open")
    assert eager.start(gate.passed()) == "open"


async def test_an_exception_before_the_first_wait_comes_out_where_it_is_started() -> None:
    async def work() -> None:
        raise Refusal

    with pytest.raises(Refusal):
        eager.start(work())


# What waits.


async def test_what_waits_has_begun_already_and_gives_its_result_to_who_awaits_the_rest() -> None:
    gate = Gate()
    work = pending(gate.passed())
    assert gate.did == ["work began"]
    task = going_on(work)
    gate.opened.set_result("open")
    assert await task == "open"
    assert gate.did == ["work began", "work went on", "work ended"]


async def test_what_it_waited_for_may_be_there_before_anybody_awaits_the_rest() -> None:
    gate = Gate()
    work = pending(gate.passed())
    gate.opened.set_result("open")
    assert await going_on(work) == "open"


async def test_it_waits_as_often_as_it_likes() -> None:
    async def work() -> list[int]:
        got = []
        for number in range(20):
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, number)
            got.append(await future)
            await asyncio.sleep(0)
        return got

    assert await going_on(pending(work())) == list(range(20))


async def test_it_begins_in_no_task_and_goes_on_in_the_one_that_awaits_the_rest() -> None:
    loop = asyncio.get_running_loop()
    seen: list[asyncio.Task[Any] | None] = []
    finished: asyncio.Future[asyncio.Task[Any]] = loop.create_future()

    async def work() -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    def begin() -> None:  # as the reader of a connection does, from a callback
        task = going_on(pending(work()))
        task.add_done_callback(finished.set_result)

    loop.call_soon(begin)
    task = await finished
    task.result()
    assert seen == [None, task]


async def test_an_exception_after_the_first_wait_comes_out_of_the_rest() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise Refusal

    with pytest.raises(Refusal):
        await going_on(pending(work()))


async def test_an_exception_of_what_it_waits_for_is_the_works_to_handle() -> None:
    gate = Gate()
    gate.opened.set_exception(Refusal())
    other = Gate()

    async def work() -> str:
        await asyncio.sleep(0)
        try:
            return await gate.passed()
        except Refusal:
            return await other.passed()

    task = going_on(pending(work()))
    other.opened.set_result("handled")
    assert await task == "handled"
    assert gate.did == ["work began", "work saw Refusal", "work ended"]


async def test_a_cancel_reaches_it_and_its_finally_blocks_run() -> None:
    gate = Gate()
    task = going_on(pending(gate.passed()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.did == ["work began", "work saw CancelledError", "work ended"]


async def test_one_whose_task_is_cancelled_before_it_begins_runs_its_finally_blocks_when_it_is_dropped() -> None:
    gate = Gate()
    task = going_on(pending(gate.passed()))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    gc.collect()
    assert gate.did == ["work began", "work saw GeneratorExit", "work ended"]


async def test_a_cancel_may_be_survived() -> None:
    gate, other = Gate(), Gate()

    async def work() -> str:
        try:
            return await gate.passed()
        except asyncio.CancelledError:
            return await other.passed()

    task = going_on(pending(work()))
    await asyncio.sleep(0)
    task.cancel()
    other.opened.set_result("survived")
    assert await task == "survived"


async def test_a_cancel_reaches_it_also_while_it_waits_for_no_more_than_its_turn() -> None:
    did: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            did.append("ended")
        did.append("went on")

    task = going_on(pending(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert (did, task.cancelled()) == (["ended"], True)


async def test_one_that_is_closed_while_it_waits_runs_its_finally_blocks_at_once() -> None:
    gate = Gate()
    coroutine = gate.passed()  # held, so that nobody else can have closed it
    work = pending(coroutine)

    async def rest() -> None:
        await work.rest()

    going = rest()
    going.send(None)
    assert gate.did == ["work began"]
    going.close()
    assert gate.did == ["work began", "work saw GeneratorExit", "work ended"]
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


async def test_they_begin_in_the_order_of_their_starts_and_end_as_what_they_wait_for_comes() -> None:
    first, second = Gate(), Gate()
    second.did = first.did
    works = [pending(first.passed("first")), pending(second.passed("second"))]
    assert first.did == ["first began", "second began"]
    tasks = [going_on(work) for work in works]
    second.opened.set_result(None)
    await tasks[1]
    first.opened.set_result(None)
    await tasks[0]
    assert first.did[2:] == ["second went on", "second ended", "first went on", "first ended"]


# Methods of a module.


@method("eager.timeout", waits=True)
async def within_a_timeout(session: Session) -> str:
    """Begins with a timeout, which needs a task."""
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        return "in time"


@method("eager.late", waits=True)
async def too_late(session: Session) -> str:
    """Begins with a timeout that passes."""
    try:
        async with asyncio.timeout(0):
            await asyncio.get_running_loop().create_future()
    except TimeoutError:
        return "too late"
    return "in time"


@method("eager.group", waits=True)
async def within_a_group(session: Session) -> list[str]:
    """Begins with a group of tasks, which needs a task of its own."""

    async def part(name: str) -> str:
        await asyncio.sleep(0)
        return name

    async with asyncio.TaskGroup() as group:
        parts = [group.create_task(part(name)) for name in ("one", "two")]
    return [task.result() for task in parts]


@method("eager.cancelled")
async def cancelled(session: Session) -> None:
    """Raises a cancel of its own, before it has waited."""
    raise asyncio.CancelledError


@method("eager.cancelled_late")
async def cancelled_late(session: Session) -> None:
    """Raises a cancel of its own, after it has waited."""
    await asyncio.sleep(0)
    raise asyncio.CancelledError


@method("eager.cancelled_waiting", waits=True)
async def cancelled_waiting(session: Session) -> None:
    """Raises a cancel of its own as one that waits."""
    raise asyncio.CancelledError


@method("eager.cancelled_plain")
def cancelled_plain(session: Session) -> None:
    """Raises a cancel though it is no coroutine."""
    raise asyncio.CancelledError


_began: list[str] = []


@method("eager.begins")
async def begins(session: Session) -> None:
    """Says that it began, then waits."""
    _began.append("begins")
    await asyncio.sleep(0)


@method("eager.plain")
def plain(session: Session) -> None:
    """Says that it began."""
    _began.append("plain")


METHODS: list[Any] = [
    *(within_a_timeout, too_late, within_a_group),
    *(cancelled, cancelled_late, cancelled_waiting, cancelled_plain),
    *(begins, plain, get_data),
]
CANCELLED = ["eager.cancelled", "eager.cancelled_late", "eager.cancelled_waiting", "eager.cancelled_plain"]


def serving(rig: Rig) -> None:
    """Gives the rig the methods above instead of the daemon's."""
    table = Table(function.method for function in METHODS)
    rig.daemon.front.dispatcher = Dispatcher(table, rig.daemon.front.services)


def call(name: str, id_: int = 1, params: Any = None) -> dict[str, Any]:
    """A request."""
    return {"jsonrpc": "2.0", "id": id_, "method": name, **({} if params is None else {"params": params})}


@pytest.mark.parametrize(
    ("name", "result"),
    [("eager.timeout", "in time"), ("eager.late", "too late"), ("eager.group", ["one", "two"])],
)
def test_a_method_that_waits_may_begin_with_what_needs_a_task(name: str, result: Any, tmp_path: Path) -> None:
    with rigged(tmp_path) as (rig, runner):
        serving(rig)
        for message in (call(name), [call(name), call("get_data", 2)]):
            (frame,) = runner.run(rig.receive(json.dumps(message).encode()))
            answers = json.loads(frame)
            answers = [answers] if isinstance(answers, dict) else sorted(answers, key=lambda answer: int(answer["id"]))
            assert answers[0]["result"] == result
        assert rig.daemon.counters.internal_errors == 0


@pytest.mark.parametrize("name", CANCELLED)
def test_a_method_that_raises_a_cancel_of_its_own_is_a_defect_and_the_connection_goes_on(
    name: str, tmp_path: Path
) -> None:
    with rigged(tmp_path) as (rig, runner):
        serving(rig)
        (frame,) = runner.run(rig.receive(json.dumps(call(name)).encode()))
        answer = json.loads(frame)
        assert (answer["id"], answer["error"]["data"]["type"]) == (1, "internal_error")
        (frame,) = runner.run(rig.receive(json.dumps([call(name), call("get_data", 2), call(name, 3)]).encode()))
        answers = {reply["id"]: reply for reply in json.loads(frame)}
        assert answers[2]["result"] == ["hello", 5]
        assert [answers[id_]["error"]["data"]["type"] for id_ in (1, 3)] == ["internal_error"] * 2
        (frame,) = runner.run(rig.receive(json.dumps(call("get_data")).encode()))
        assert json.loads(frame)["result"] == ["hello", 5]
        assert (rig.session.in_flight, rig.session.waiting) == (0, 0)
        assert rig.connection.ended is None
        assert rig.daemon.counters.internal_errors == 3


def test_short_methods_start_in_the_order_of_their_arrival_whether_they_wait_or_not(tmp_path: Path) -> None:
    with rigged(tmp_path) as (rig, runner):
        serving(rig)
        _began.clear()

        async def all_three() -> list[bytes]:
            for name in ("eager.begins", "eager.plain"):
                rig.daemon.front.dispatcher.receive(rig.session, json.dumps(call(name, 1)).encode())
            assert _began == ["begins", "plain"]
            assert rig.session.in_flight == 1
            return await rig.receive(json.dumps([call("eager.begins", 2), call("eager.plain", 3)]).encode())

        frames = runner.run(all_three())
        assert _began == ["begins", "plain"] * 2
        assert len(frames) == 3
