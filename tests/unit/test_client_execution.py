"""One call of a hosted tool: how each kind runs, streams, ends and is cancelled. The connection is made up."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Annotated, Any, cast

import msgspec
import pytest
from msgspec import Meta, Raw

from carserver.client.connection import Connection
from carserver.client.errors import ConnectionLost
from carserver.client.execution import LARGEST_BYTES, TEXT_CHARACTERS, Execution, Progress, Result, Threads, progress
from carserver.client.signatures import read_tool
from carserver.protocol.tools import ExecuteTool


class Wire:
    """Takes what is sent; while `open` is not set, it does so as a socket does that is full: not at all."""

    def __init__(self) -> None:
        self.chunks: list[dict[str, Any]] = []
        self.result: Any = None
        self.error: str | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.sending = asyncio.Event()

    async def notify(self, method: str, params: Any) -> None:
        assert method == "tools.chunk"
        self.sending.set()
        await self.open.wait()
        told = msgspec.json.decode(msgspec.json.encode(params))
        assert told["request_id"] == "r1"
        self.chunks.append(told["chunk"])

    async def answer(self, id_: str, result: Any) -> None:
        assert id_ == "r1"
        self.result = msgspec.json.decode(msgspec.json.encode(result))

    async def refuse(self, id_: str, message: str) -> None:
        assert id_ == "r1"
        self.error = message

    @property
    def texts(self) -> list[str]:
        return [chunk["text"] for chunk in self.chunks if chunk["kind"] == "text"]


def begun(wire: Wire, function: Callable[..., Any], **arguments: Any) -> tuple[Execution, "asyncio.Task[None]"]:
    asked = ExecuteTool(
        request_id="r1",
        tool="tool",
        parameters=Raw(json.dumps(arguments).encode()),
        action_id="",
        attempt=1,
        timeout_ms=None,
        session_id="c1",
    )
    tool = read_tool(function, name="tool")
    execution = Execution(cast(Connection, wire), asked, tool, Threads())
    return execution, asyncio.create_task(execution.run())


async def ran(function: Callable[..., Any], **arguments: Any) -> Wire:
    wire = Wire()
    _, task = begun(wire, function, **arguments)
    await task
    return wire


# How each kind ends well.


async def test_a_function_runs_in_a_thread_and_its_value_is_the_result() -> None:
    def name(of: int) -> list[str]:
        return [threading.current_thread().name] * of

    wire = await ran(name, of=2)
    assert len(wire.result) == 2
    assert wire.result[0].startswith("carserver-tool")


async def test_a_coroutine_runs_on_the_loop_and_its_value_is_the_result() -> None:
    async def name() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert (await ran(name)).result == "MainThread"


async def test_what_an_async_generator_yields_is_streamed_by_its_kind() -> None:
    async def work() -> AsyncIterator[Any]:
        yield "text"
        yield {"a": [1]}
        yield None
        yield Progress(0.5)
        yield Progress(1, "all")
        yield Result({"n": 3})
        yield "never"

    wire = await ran(work)
    assert wire.chunks == [
        {"kind": "text", "text": "text"},
        {"kind": "data", "data": {"a": [1]}},
        {"kind": "data", "data": None},
        {"kind": "progress", "fraction": 0.5},
        {"kind": "progress", "fraction": 1, "message": "all"},
    ]
    assert wire.result == {"n": 3}


async def test_an_async_generator_without_a_result_has_none() -> None:
    async def work() -> AsyncIterator[str]:
        yield "text"

    wire = await ran(work)
    assert (wire.texts, wire.result, wire.error) == (["text"], None, None)


async def test_a_generator_streams_from_its_thread_and_returns_its_result() -> None:
    def work(to: int) -> Generator[str, None, dict[str, int]]:
        for n in range(to):
            yield f"{n} "
        return {"to": to}

    wire = await ran(work, to=3)
    assert (wire.texts, wire.result) == (["0 ", "1 ", "2 "], {"to": 3})


async def test_progress_is_told_from_coroutines_and_threads_and_the_last_of_it_before_the_answer() -> None:
    async def walk() -> None:
        progress(0.25)
        await asyncio.sleep(0)
        progress(1, "there")

    def run() -> None:
        progress(0.25)
        progress(1, "there")

    for function in (walk, run):
        wire = await ran(function)
        assert wire.chunks[-1] == {"kind": "progress", "fraction": 1, "message": "there"}


async def test_the_answer_waits_for_the_last_progress() -> None:
    wire = Wire()
    wire.open.clear()

    async def work() -> str:
        progress(0.5)
        await wire.sending.wait()
        progress(1)
        return "done"

    _, task = begun(wire, work)
    await wire.sending.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert wire.result is None
    wire.open.set()
    await task
    assert [chunk["fraction"] for chunk in wire.chunks] == [0.5, 1]
    assert task.done()


async def test_progress_keeps_its_place_before_what_is_yielded_after_it() -> None:
    async def work() -> AsyncIterator[str]:
        progress(0.5)
        yield "half"

    assert [chunk["kind"] for chunk in (await ran(work)).chunks] == ["progress", "text"]


def test_progress_outside_of_a_call_tells_nobody_and_is_still_checked() -> None:
    progress(0.5)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            progress(wrong)


async def test_long_text_goes_in_pieces() -> None:
    long = "x" * (2 * TEXT_CHARACTERS + 1)

    async def work() -> AsyncIterator[str]:
        yield long

    wire = await ran(work)
    assert [len(text) for text in wire.texts] == [TEXT_CHARACTERS, TEXT_CHARACTERS, 1]


# How it ends badly.


async def test_an_exception_is_its_type_and_message_and_no_traceback() -> None:
    async def coroutine() -> None:
        raise ValueError("no such folder")

    def function() -> None:
        raise LookupError

    async def stream() -> AsyncIterator[str]:
        yield "first"
        raise OSError(2, "gone")

    def leaves() -> None:
        raise SystemExit(3)

    async def after(function: Callable[..., Any]) -> str | None:
        return (await ran(function)).error

    async def several() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(coroutine())

    async def odd() -> None:
        raise OSError("no file \udcff")

    assert await after(several) == (
        "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception): ValueError: no such folder"
    )
    assert await after(odd) == "OSError: no file ?"
    assert await after(coroutine) == "ValueError: no such folder"
    assert await after(function) == "LookupError"
    assert await after(stream) == "FileNotFoundError: [Errno 2] gone"
    assert await after(leaves) == "RuntimeError: SystemExit: 3"


async def test_the_words_of_an_exception_are_cut_and_that_is_said() -> None:
    async def work() -> None:
        raise ValueError("x" * 1_000_000)

    error = (await ran(work)).error
    assert error is not None
    assert len(error) < 10_000
    assert error.endswith("… (cut: 1000012 bytes in all)")


async def test_a_result_or_chunk_that_is_too_large_is_said_and_not_sent() -> None:
    large = "x" * (LARGEST_BYTES + 1)

    async def result() -> str:
        return large

    async def chunk() -> AsyncIterator[list[str]]:
        yield [large]

    wire = await ran(result)
    assert wire.error == f"TooLarge: its result has {LARGEST_BYTES + 3:,} bytes as JSON; at most 15,728,640 are taken"
    wire = await ran(chunk)
    assert wire.error is not None
    assert wire.error.startswith("TooLarge: a chunk has ")
    assert wire.chunks == []


async def test_what_json_has_no_words_for_is_said() -> None:
    async def work() -> object:
        return object()

    assert (await ran(work)).error == "TypeError: Encoding objects of type object is unsupported"


async def test_arguments_that_do_not_fit_are_said() -> None:
    async def work(n: Annotated[int, Meta(ge=1)]) -> None: ...

    error = (await ran(work, n=0)).error
    assert error == "ValidationError: Expected `int` >= 1 - at `$.n`"


# Cancelling.


async def test_a_coroutine_that_is_cancelled_sees_it_and_is_answered_when_it_has_ended() -> None:
    seen: list[str] = []
    waits, cleaned = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await cleaned.wait()
            raise

    wire = Wire()
    execution, task = begun(wire, work)
    await waits.wait()
    execution.cancel()
    await asyncio.sleep(0)
    assert (seen, wire.error) == (["cancelled"], None)
    cleaned.set()
    await task
    assert wire.error == "cancelled"


async def test_one_that_is_cancelled_before_it_begins_is_answered() -> None:
    async def work() -> None:
        raise AssertionError("it began")

    wire = Wire()
    execution, task = begun(wire, work)
    execution.cancel()
    await task
    assert wire.error == "cancelled"


async def test_a_generator_that_waits_for_the_socket_is_cancelled_where_it_yields() -> None:
    seen: list[str] = []

    async def work() -> AsyncIterator[str]:
        try:
            yield "text"
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    wire = Wire()
    wire.open.clear()
    execution, task = begun(wire, work)
    await wire.sending.wait()
    execution.cancel()
    await task
    assert (seen, wire.error) == (["cancelled"], "cancelled")


async def test_a_generator_that_never_waits_can_be_cancelled_all_the_same() -> None:
    async def work() -> AsyncIterator[str]:
        while True:
            yield "text"

    wire = Wire()
    execution, task = begun(wire, work)
    await wire.sending.wait()
    execution.cancel()
    await task
    assert wire.error == "cancelled"


async def test_a_function_that_is_cancelled_goes_on_to_its_end_and_the_answer_says_so() -> None:
    began, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> str:
        loop.call_soon_threadsafe(began.set)
        go_on.wait(20)
        return "done"

    wire = Wire()
    execution, task = begun(wire, work)
    await began.wait()
    execution.cancel()
    await asyncio.sleep(0)
    assert (wire.error, task.done()) == (None, False)
    go_on.set()
    await task
    assert wire.error == "cancelled: it runs in a thread, could not be stopped and went on to its end"


async def test_a_function_that_tells_progress_learns_there_that_it_is_cancelled() -> None:
    began, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    seen: list[str] = []

    def work() -> None:
        progress(0.1)
        loop.call_soon_threadsafe(began.set)
        go_on.wait(20)
        try:
            progress(0.2)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    wire = Wire()
    execution, task = begun(wire, work)
    await began.wait()
    execution.cancel()
    go_on.set()
    await task
    assert (seen, wire.error) == (["cancelled"], "cancelled")


async def test_a_generator_in_a_thread_is_cancelled_where_it_yields() -> None:
    seen: list[str] = []

    def work() -> Iterator[str]:
        try:
            while True:
                yield "text"
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    wire = Wire()
    execution, task = begun(wire, work)
    await wire.sending.wait()
    execution.cancel()
    await task
    assert (seen, wire.error) == (["cancelled"], "cancelled")


# More than the socket takes.


async def test_a_generator_that_is_faster_than_the_socket_waits() -> None:
    made: list[int] = []

    async def work() -> AsyncIterator[str]:
        for n in range(1_000):
            made.append(n)
            yield "text"

    wire = Wire()
    wire.open.clear()
    _, task = begun(wire, work)
    await wire.sending.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert made == [0]
    wire.open.set()
    await task
    assert len(wire.texts) == len(made) == 1_000


async def test_progress_that_the_socket_has_not_taken_is_replaced_by_what_is_newer() -> None:
    told = asyncio.Event()

    async def work() -> None:
        for n in range(1_000):
            progress(n / 1_000)
            await asyncio.sleep(0)
        told.set()

    wire = Wire()
    wire.open.clear()
    _, task = begun(wire, work)
    await told.wait()
    wire.open.set()
    await task
    fractions = [chunk["fraction"] for chunk in wire.chunks]
    assert len(fractions) == 2
    assert fractions[-1] == 0.999


async def test_where_the_connection_is_gone_a_generator_ends_and_nobody_is_answered() -> None:
    ended: list[str] = []

    async def stream() -> AsyncIterator[str]:
        try:
            while True:
                yield "text"
        finally:
            ended.append("stream")

    def blocks() -> Iterator[str]:
        try:
            while True:
                yield "text"
        finally:
            ended.append("blocks")

    class Gone(Wire):
        async def notify(self, method: str, params: Any) -> None:
            raise ConnectionLost(1006)

        async def refuse(self, id_: str, message: str) -> None:
            raise ConnectionLost(1006)

    for function in (stream, blocks):
        _, task = begun(Gone(), function)
        with pytest.raises(ConnectionLost):
            await task
    assert ended == ["stream", "blocks"]
