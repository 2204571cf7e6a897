"""What code that is there already logs and calls, as events of the current run (`carserver.client.logs`)."""

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from carserver.cli.view_model import RunModel
from carserver.cli.view_tree import State
from carserver.client.errors import BufferFull, NotRecorded
from carserver.client.logs import LoggingHandler, recorded
from carserver.client.trace import Traced
from carserver.protocol.runs import Snapshot
from tests.unit.fakecar import FakeCar, numbered, run_of
from tests.unit.fakedaemon import snapshot


@contextlib.contextmanager
def logging_to(handler: LoggingHandler, name: str = "agent") -> Iterator[logging.Logger]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def entries(car: FakeCar) -> list[dict[str, Any]]:
    """Without the run's end, and what differs from time to time."""
    return [{name: value for name, value in event.items() if name not in {"at_ms", "id"}} for event in car.log[:-1]]


async def test_what_is_logged_within_the_block_is_recorded() -> None:
    car = FakeCar()
    with logging_to(LoggingHandler(level=logging.INFO)) as logger:
        logger.info("before")
        async with run_of(car) as run:
            logger.info("%s is %d", "it", 3)
            await run.record({"type": "step"})
            logger.debug("too low")
            await asyncio.to_thread(logger.warning, "from a thread")
        logger.info("after")
    assert entries(car) == [
        {"type": "log", "level": "INFO", "logger": "agent", "message": "it is 3"},
        {"type": "step"},
        {"type": "log", "level": "WARNING", "logger": "agent", "message": "from a thread"},
    ]
    assert car.log[0]["at_ms"] > 1_700_000_000_000


async def test_what_is_logged_may_have_lone_surrogates_as_names_of_files_do() -> None:
    car = FakeCar()
    async with run_of(car):
        LoggingHandler().handle(logging.makeLogRecord({"name": "agent", "msg": "cannot open \ud800"}))
    assert entries(car)[0]["message"] == "cannot open ?"


async def test_an_exception_is_logged_by_its_type_and_message() -> None:
    car = FakeCar()
    with logging_to(LoggingHandler()) as logger:
        async with run_of(car):
            try:
                int("secret_of_a_frame")
            except ValueError:
                logger.exception("it failed")
    assert entries(car) == [
        {
            "type": "log",
            "level": "ERROR",
            "logger": "agent",
            "message": "it failed",
            "error": "ValueError: invalid literal for int() with base 10: 'secret_of_a_frame'",
        }
    ]


async def test_what_the_client_logs_itself_is_not_recorded() -> None:
    car = FakeCar()
    with logging_to(LoggingHandler(), "carserver") as logger:
        async with run_of(car):
            logger.warning("about itself")
            logging.getLogger("carserver.client").warning("about itself")
    assert entries(car) == []


async def test_a_thread_of_its_own_has_no_current_run_but_may_name_one() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        for handler in (LoggingHandler(), LoggingHandler(run)):
            with logging_to(handler) as logger:
                thread = threading.Thread(target=logger.info, args=["hello"])
                thread.start()
                await asyncio.to_thread(thread.join)
    assert len(entries(car)) == 1


async def test_where_there_is_no_room_the_loop_is_told_and_a_thread_waits_without_holding_up_the_loop() -> None:
    car = FakeCar()
    with logging_to(LoggingHandler()) as logger:
        async with run_of(car, buffer_events=10) as run:
            car.open.clear()
            await run.record(*numbered(10))
            waiting = asyncio.create_task(asyncio.to_thread(logger.info, "from a thread"))
            await car.asked.wait()
            with pytest.raises(BufferFull):
                logger.info("from the loop")
            assert not waiting.done()
            car.open.set()
            await waiting
    assert [event.get("message") for event in car.log[10:-1]] == ["from a thread"]


async def test_what_is_logged_when_nothing_is_recorded_any_more_is_counted_at_the_end() -> None:
    car = FakeCar()
    car.before = [car.gone()]

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(2))
            with pytest.raises(NotRecorded):
                await run.flush()
            logger.info("one")
            logger.info("two")

    with logging_to(LoggingHandler()) as logger, pytest.raises(NotRecorded, match="5 events of run-1 were not"):
        await agent()


async def test_a_wrong_format_is_told_as_logging_does_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    car = FakeCar()
    async with run_of(car):
        LoggingHandler().handle(logging.makeLogRecord({"name": "agent", "msg": "%d", "args": ("no number",)}))
    assert "Logging error" in capsys.readouterr().err
    assert entries(car) == []


# Calls.


@recorded
def add(first: int, second: int = 1) -> int:
    return first + second


@recorded(name="search")
async def look(words: str) -> list[str]:
    await asyncio.sleep(0)
    if words == "nothing":
        raise LookupError("no such words")
    return words.split()


async def test_the_calls_of_functions_and_coroutines_are_recorded_as_tools() -> None:
    car = FakeCar()
    assert add(1) == 2  # no run: as if it were not decorated
    async with run_of(car):
        assert add(1, second=2) == 3
        assert await look("a b") == ["a", "b"]
        assert await asyncio.to_thread(add, 5) == 6
        with pytest.raises(LookupError):
            await look(words="nothing")
    assert entries(car) == [
        {"type": "tool_start", "name": "add", "args": {"first": 1, "second": 2}},
        {"type": "tool_end", "name": "add", "output": "3"},
        {"type": "tool_start", "name": "search", "args": {"words": "a b"}},
        {"type": "tool_end", "name": "search", "output": '["a","b"]'},
        {"type": "tool_start", "name": "add", "args": {"first": 5}},
        {"type": "tool_end", "name": "add", "output": "6"},
        {"type": "tool_start", "name": "search", "args": {"words": "nothing"}},
        {"type": "tool_end", "name": "search", "output": "", "error": "LookupError: no such words"},
    ]
    ids = [event["id"] for event in car.log[:-1]]
    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == 4


async def test_the_live_view_shows_a_call_as_a_tool() -> None:
    car = FakeCar()
    async with run_of(car):
        await look("a b")
        with pytest.raises(LookupError):
            await look("nothing")
    model = RunModel(msgspec.convert(snapshot(), Snapshot))
    for sequence, event in enumerate(car.log):
        record = {"record": "event", "sequence": sequence, "timestamp_ms": 1, "event": event}
        model.take(
            Traced(run_id="run-1", agent_id="", record=record, cursor=sequence + 1, status="", run_status="executing")
        )
    good, bad = model.tree.root.children
    assert (good.title, good.detail, good.output, good.state) == ("search", "a b", '["a","b"]', State.DONE)
    assert (bad.title, bad.detail, bad.output, bad.state) == (
        "search",
        "nothing",
        "LookupError: no such words",
        State.FAILED,
    )


async def test_what_is_a_secret_is_left_out_and_what_is_long_or_no_json_is_told_in_short() -> None:
    car = FakeCar()

    class Own:
        @recorded(arguments=False, result=False)
        def log_in(self, password: str) -> str:
            return password

        @recorded
        def odd(self, value: Any, other: Any = None) -> Any:
            return value

    async with run_of(car):
        Own().log_in("hunter2")
        Own().odd({1, 2}, other="x" * 5_000)
        Own().odd(object)
        with pytest.raises(TypeError):
            Own().odd()  # type: ignore[call-arg]
    assert "hunter2" not in str(car.log)
    first, second, third = (event for event in car.log if event.get("args"))
    assert first["args"]["value"] == "[1,2]"
    assert first["args"]["other"].endswith("… (cut: 5002 characters in all)")
    assert second["args"] == {"value": "<class 'object'>"}
    assert list(third["args"]) == ["arguments"]


def test_a_generator_cannot_be_recorded() -> None:
    with pytest.raises(TypeError, match="numbers is a generator"):

        @recorded
        def numbers() -> Iterator[int]:
            yield 1


async def test_what_a_call_raises_is_not_replaced_by_trouble_with_recording_it() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=1) as run:
        await run.flush()
        car.open.clear()

        @recorded
        def fail() -> None:
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine") as caught:
            fail()
        assert "the end of fail was not recorded" in caught.value.__notes__[0]
        car.open.set()


async def test_a_call_that_outlives_the_block_is_no_longer_part_of_its_run() -> None:
    car = FakeCar()
    go_on = asyncio.Event()

    @recorded
    async def slow() -> str:
        await go_on.wait()
        return "done"

    async with run_of(car):
        task = asyncio.create_task(slow(), context=contextvars.copy_context())
        await asyncio.sleep(0)
    go_on.set()
    assert await task == "done"
    assert [event["type"] for event in entries(car)] == ["tool_start"]
