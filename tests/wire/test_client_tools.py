"""Tools that a program hosts by `@car.tool`, called by others: registered, run, streamed, cancelled, and again."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import pytest
from msgspec import Meta, Raw

from carserver.client import CallError
from carserver.client.car import Car, connect
from carserver.client.execution import LARGEST_BYTES, Progress, Result, progress
from carserver.client.hosting import AT_ONCE
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import polled, until_ended
from tests.peer import Peer, Refused, peer


def car_of(daemon: Daemon) -> Car:
    return connect(state_dir=daemon.state)


async def called(caller: Peer, tool: str, **parameters: Any) -> Any:
    return await caller.call("tools.call", {"tool": tool, "parameters": parameters})


async def invoked(caller: Peer, tool: str, **parameters: Any) -> str:
    handle: str = (await caller.call("tools.invoke", {"tool": tool, "parameters": parameters}))["handle"]
    return handle


async def until_listed(caller: Peer, name: str) -> None:
    while name not in [tool["name"] for tool in (await caller.call("tools.list"))["tools"]]:  # noqa: ASYNC110 - far away
        await asyncio.sleep(0.02)


# Registered.


async def test_a_tool_is_listed_with_the_schema_of_its_hints(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    def grep(pattern: str, most: Annotated[int, Meta(ge=1)] = 10) -> list[str]:
        """Searches."""
        return [pattern] * most

    async with car, peer(served) as caller:
        (listed,) = (await caller.call("tools.list"))["tools"]
        assert listed == {
            "name": "grep",
            "source": "client",
            "description": "Searches.",
            "parameters": {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "most": {"type": "integer", "minimum": 1, "default": 10}},
                "required": ["pattern"],
                "additionalProperties": False,
            },
            "returns": {"type": "array", "items": {"type": "string"}},
            "idempotent": False,
        }
        assert (await called(caller, "grep", pattern="x", most=2.0))["result"] == ["x", "x"]
        with pytest.raises(Refused, match="most"):
            await called(caller, "grep", pattern="x", most=0)
        with pytest.raises(Refused, match="pattern"):
            await called(caller, "grep")


async def test_a_tool_that_is_offered_while_connected_can_be_called_at_once(served: Daemon) -> None:
    async with car_of(served) as car:

        @car.tool(name="double")
        async def twice(n: int) -> int:
            return 2 * n

        answer = await car.tools.call("double", parameters={"n": 21})
        assert isinstance(answer.result, Raw)
        assert bytes(answer.result) == b"42"
        assert await twice(4) == 8


async def test_tools_are_gone_when_the_car_is_closed(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    def now() -> str:
        return ""

    async with peer(served) as caller:
        async with car:
            assert (await caller.call("tools.list"))["count"] == 1
        assert (await caller.call("tools.list"))["count"] == 0


async def test_a_schema_that_the_daemon_refuses_is_an_error_at_the_beginning(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    def grep(pattern: Annotated[str, Meta(pattern="(?=a)")]) -> None: ...

    with pytest.raises(CallError, match="pattern"):
        await car.open()


async def test_a_refused_tool_spoils_no_other_and_is_logged(served: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    async with car_of(served) as car:

        @car.tool
        def bad(pattern: Annotated[str, Meta(pattern="(?=a)")]) -> None: ...

        @car.tool
        def good() -> str:
            return "fine"

        assert [tool.name for tool in (await car.tools.list()).tools] == ["good"]
    assert "tool 'bad' is refused" in caplog.text


async def test_a_name_that_somebody_else_has_is_tried_again_until_it_is_free(
    served: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with peer(served) as caller, peer(served) as other:
        await other.call("tools.register", [{"name": "now"}])
        async with car_of(served) as car:

            @car.tool
            def now() -> str:
                return "mine"

            @car.tool
            def then() -> str:
                return "mine too"

            await car.tools.list()  # comes after what was offered
            assert "tool 'now' is not registered" in caplog.text
            assert "another session hosts" in caplog.text
            assert (await called(caller, "then"))["result"] == "mine too"
            await other.call("tools.unregister", {"name": "now"})
            await until_listed(caller, "now")
            assert (await called(caller, "now"))["result"] == "mine"


# Run.


async def test_many_calls_run_at_once_and_one_more_than_may_is_refused(served: Daemon) -> None:
    car = car_of(served)
    all_in, go_on = asyncio.Event(), asyncio.Event()
    inside: list[int] = []

    @car.tool
    async def wait(n: int) -> int:
        inside.append(n)
        if len(inside) == AT_ONCE:
            all_in.set()
        await go_on.wait()
        return n

    async with car, peer(served) as caller:
        handles = [await invoked(caller, "wait", n=n) for n in range(AT_ONCE)]
        await all_in.wait()
        refused = await until_ended(caller, await invoked(caller, "wait", n=AT_ONCE))
        assert refused[1]["status"] == "failed"
        assert refused[1]["error"] == "this host runs 64 calls already (at_once)"
        go_on.set()
        results = [(await until_ended(caller, handle))[1]["result"] for handle in handles]
        assert results == list(range(AT_ONCE))


async def test_chunks_of_every_kind_arrive_in_order(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    async def work() -> AsyncIterator[Any]:
        yield "a"
        yield {"n": 1}
        yield Progress(0.5, "half")
        progress(0.75)
        yield "b"
        yield Result([1])

    @car.tool
    def lines() -> Iterator[str]:
        yield "x"
        yield "y"

    async with car, peer(served) as caller:
        chunks, ended = await until_ended(caller, await invoked(caller, "work"))
        assert chunks == [
            {"kind": "text", "text": "a"},
            {"kind": "data", "data": {"n": 1}},
            {"kind": "progress", "fraction": 0.5, "message": "half"},
            {"kind": "progress", "fraction": 0.75},
            {"kind": "text", "text": "b"},
            {"kind": "done", "result": [1]},
        ]
        assert ended["result"] == [1]
        chunks, ended = await until_ended(caller, await invoked(caller, "lines"))
        assert [chunk.get("text") for chunk in chunks] == ["x", "y", None]
        assert (ended["status"], ended.get("result")) == ("succeeded", None)


async def test_a_stream_that_nobody_drains_does_not_hold_its_tool_up_for_ever(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    async def flood(n: int) -> AsyncIterator[str | Result]:
        for _ in range(n):
            yield "x" * 1_000
        yield Result("done")

    async with car, peer(served) as caller:
        handle = await invoked(caller, "flood", n=10_000)
        while (answer := await polled(caller, handle, wait_ms=10_000, after=0))["status"] == "running":
            pass
        assert answer["result"] == "done"


async def test_an_exception_fails_the_call_with_its_type_and_message(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    def fail(how: str) -> None:
        raise LookupError(how)

    async with car, peer(served) as caller:
        answer = await called(caller, "fail", how="no such key")
        assert (answer["status"], answer["error"]) == ("failed", "LookupError: no such key")


async def test_a_large_result_is_an_output_and_one_that_is_too_large_fails(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    async def text(of: int) -> str:
        return "x" * of

    @car.tool
    async def data(of: int) -> AsyncIterator[list[str]]:
        yield ["x" * of]

    async with car, peer(served) as caller:
        large = await called(caller, "text", of=1_000_000)
        assert large["result_ref"]["size"] == 1_000_002
        assert (await called(caller, "text", of=LARGEST_BYTES - 2))["result_ref"]["size"] == LARGEST_BYTES
        over = await called(caller, "text", of=LARGEST_BYTES)
        assert (over["status"], over["error"][:9]) == ("failed", "TooLarge:")
        over = await called(caller, "data", of=LARGEST_BYTES)
        assert (over["status"], over["error"][:9]) == ("failed", "TooLarge:")
        over = await called(caller, "data", of=100_000)  # the daemon's own bound
        assert over["status"] == "failed"
        assert "chunk_bytes" in over["error"]
        assert (await called(caller, "text", of=1))["result"] == "x"


# Cancelled.


async def test_a_cancelled_coroutine_sees_it_and_the_cancel_is_confirmed(served: Daemon) -> None:
    car = car_of(served)
    seen: list[str] = []
    waits = asyncio.Event()

    @car.tool
    async def wait() -> None:
        try:
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with car, peer(served) as caller:
        handle = await invoked(caller, "wait")
        await waits.wait()
        assert await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000}) == {
            "cancelled": True,
            "cancel": "confirmed",
        }
        assert seen == ["cancelled"]


async def test_a_deadline_cancels_it(served: Daemon) -> None:
    car = car_of(served)
    began, ended = asyncio.Event(), asyncio.Event()

    @car.tool
    async def wait() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with car, peer(served) as caller:
        while not began.is_set():  # a busy machine may bring the call and its cancel at once
            answer = await caller.call("tools.call", {"tool": "wait", "timeout_ms": 100})
            assert (answer["status"], answer["error"]) == ("failed", "deadline of 100 ms")
        await ended.wait()


async def test_a_cancelled_function_is_confirmed_when_its_thread_is_done_and_not_before(served: Daemon) -> None:
    car = car_of(served)
    began, go_on = threading.Event(), threading.Event()

    @car.tool
    def work() -> None:
        began.set()
        go_on.wait(20)

    async with car, peer(served) as caller:
        handle = await invoked(caller, "work")
        await asyncio.to_thread(began.wait)
        assert (await caller.call("tools.cancel", {"handle": handle}))["cancel"] == "requested"
        assert (await caller.call("tools.status", {"handle": handle}))["cancel"] == "requested"
        go_on.set()
        proof = await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000})
        assert proof["cancel"] == "confirmed"


# Lost connections.


async def test_a_restart_of_the_daemon_cancels_what_runs_and_registers_again(start: StartDaemon) -> None:
    daemon = start()
    car = car_of(daemon)
    began, cancelled = asyncio.Event(), asyncio.Event()

    @car.tool
    async def wait() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    @car.tool
    def double(n: int) -> int:
        return 2 * n

    async with car:
        async with peer(daemon) as caller:
            await invoked(caller, "wait")
            await began.wait()
            daemon.kill()
            await cancelled.wait()
        daemon.start()
        async with peer(daemon) as caller:
            await until_listed(caller, "double")
            await until_listed(caller, "wait")
            assert (await called(caller, "double", n=21))["result"] == 42


async def test_closing_the_car_stops_what_runs_and_says_so(served: Daemon) -> None:
    car = car_of(served)
    began, cancelled = asyncio.Event(), asyncio.Event()

    @car.tool
    async def wait() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with peer(served) as caller:
        async with car:
            handle = await invoked(caller, "wait")
            await began.wait()
        assert cancelled.is_set()
        _, answer = await until_ended(caller, handle)
        assert (answer["status"], answer["error"]) == ("failed", "cancelled")


async def test_json_in_and_out_keeps_unicode_and_large_numbers(served: Daemon) -> None:
    car = car_of(served)

    @car.tool
    async def echo(value: Any) -> Any:
        return value

    async with car, peer(served) as caller:
        values: list[Any] = ["ünï\u2028 \U0001f600", 2**63, [1.5, None, {"a": {}}], ""]
        for value in values:
            assert json.dumps((await called(caller, "echo", value=value))["result"]) == json.dumps(value)
