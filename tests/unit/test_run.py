"""A run as a block: how it begins, what is recorded in it, how it ends (`carserver.client.run`)."""

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

from carserver.client.current import current_run
from carserver.client.errors import CallError, EventRefused, NotRecorded, RunOver
from carserver.client.run import Run, RunCancelled, cut, told
from carserver.protocol.errors import conflict, limit_exceeded
from tests.unit.fakecar import LOST, FakeCar, numbered, refusal, run_of, until

END = {"type": "agent_end", "text": ""}


class Step(msgspec.Struct, tag_field="type", tag="step"):
    n: int


async def test_a_block_creates_its_run_records_in_it_and_ends_it() -> None:
    car = FakeCar()
    async with Run(car, "do it", session_id="s", metadata={"a": 1}) as run:
        assert run.id == "run-1"
        assert current_run() is run
        await run.record({"type": "turn_start", "turn": 1})
        run.result = "done"
    assert car.log == [
        {"type": "agent_start", "prompt": "do it"},
        {"type": "turn_start", "turn": 1},
        {"type": "agent_end", "text": "done"},
    ]
    created = car.made("runs.create")[0]
    assert len(created.pop("idempotency_key")) == 32
    assert created == {"prompt": "do it", "session_id": "s", "metadata": {"a": 1}}
    assert current_run() is None


async def test_two_runs_without_a_key_have_keys_of_their_own() -> None:
    car = FakeCar()
    for _ in range(2):
        async with run_of(car):
            pass
    first, second = (call["idempotency_key"] for call in car.made("runs.create"))
    assert first != second


async def test_a_run_that_is_gone_on_with_has_no_second_beginning() -> None:
    car = FakeCar()
    car.run |= {"status": "interrupted", "event_count": 7}
    async with Run(car, "do it", key="job-1"):
        pass
    assert car.made("runs.create")[0]["idempotency_key"] == "job-1"
    assert car.made("runs.resume") == [{"run_id": "run-1"}]
    assert car.log == [END]


async def test_the_run_of_a_key_that_is_over_is_not_begun_again() -> None:
    car = FakeCar()
    car.run["status"] = "completed"

    async def agent() -> None:
        async with run_of(car, key="job-1"):
            pytest.fail("the block was entered")

    with pytest.raises(RunOver, match="run-1, the run of this key, is completed already"):
        await agent()
    assert not car.link._told["runs.cancelled"]


async def test_events_may_be_dicts_structs_and_json() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        await run.record(
            {"type": "step", "n": 0}, Step(1), b'{"type":"step","n":2}', msgspec.Raw(b'{"type":"step","n":3}')
        )
    assert car.log == [*numbered(4), END]


@pytest.mark.parametrize(
    "event",
    [
        {"n": 1},
        {"type": 1},
        [],
        b'{"type":"a","b":NaN}',
        b'{"type":"a"',
        b'{"type":"a","b":"\\ud800"}',
        b"[" * 49 + b"]" * 49,
        {"type": "a", "b": "\ud800"},
        {"type": "a", "b": object()},
        {"type": "a", "b": "x" * 16_000_000},
    ],
    ids=["no type", "type", "array", "NaN", "half", "surrogate", "deep", "surrogate in a dict", "object", "large"],
)
async def test_what_is_no_event_is_refused_where_it_is_recorded_and_takes_nothing_with_it(event: Any) -> None:
    car = FakeCar()
    async with run_of(car) as run:
        with pytest.raises((TypeError, ValueError)):
            await run.record({"type": "before"}, event)
        await run.record({"type": "after"})
    assert car.log == [{"type": "after"}, END]


@pytest.mark.parametrize("end", [{"type": "agent_end", "text": "my own"}, {"type": "error", "message": "no"}])
async def test_an_end_that_the_block_recorded_is_the_only_one(end: dict[str, Any]) -> None:
    car = FakeCar()
    async with run_of(car) as run:
        await run.record({"type": "text_delta", "text": '"agent_end"'})
        await run.record(end)
    assert car.log[-1] == end
    assert len(car.log) == 2


async def test_pieces_of_text_share_an_event_and_keep_their_place_among_the_others() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        for piece in ("a", "b", "ü\n", ""):
            await run.text(piece)
        await run.record({"type": "step", "n": 0})
        run.text_nowait("c")
        await asyncio.to_thread(run.text_from_thread, "d")
        await run.text("x" * 200_000)
    texts = [event["text"] for event in car.log if event["type"] == "text_delta"]
    assert car.log[0] == {"type": "text_delta", "text": "abü\n"}
    assert car.log[1] == {"type": "step", "n": 0}
    assert "".join(texts[1:]) == "cd" + "x" * 200_000
    assert all(len(text) < 65_536 for text in texts)


async def test_an_exception_fails_the_run_by_its_type_and_message_after_what_was_recorded() -> None:
    car = FakeCar()

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(3))
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        await agent()
    assert car.log == numbered(3)
    assert car.made("runs.fail") == [{"run_id": "run-1", "error": "ValueError: no such model"}]
    assert [method for method, _ in car.calls] == ["runs.create", "runs.record", "runs.fail"]


async def test_the_exceptions_of_a_task_group_are_told_one_by_one() -> None:
    car = FakeCar()

    async def fail() -> None:
        raise KeyError("x")

    async def agent() -> None:
        async with run_of(car), asyncio.TaskGroup() as group:
            group.create_task(fail())

    with pytest.raises(ExceptionGroup):
        await agent()
    assert car.run["error"] == "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception): KeyError: 'x'"


def test_an_error_is_cut_to_what_the_daemon_takes_and_says_so() -> None:
    text = cut("ü" * 1_000, 100)
    assert len(text.encode()) <= 100
    assert text.endswith("ü… (cut: 2000 bytes in all)")
    assert cut("short", 100) == "short"

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert told(Odd()) == "Odd: (it has no message: that failed)"
    assert told(ValueError("\ud800")) == "ValueError: ?"
    assert told(KeyboardInterrupt()) == "KeyboardInterrupt"


async def test_an_error_is_cut_again_where_the_daemon_takes_less() -> None:
    car = FakeCar()
    car.errors["runs.fail"] = [refusal(limit_exceeded("text_bytes", 262_144, 1_000, "error"))]

    async def agent() -> None:
        async with run_of(car):
            raise ValueError("x" * 300_000)

    with pytest.raises(ValueError, match="xxx"):
        await agent()
    first, second = car.made("runs.fail")
    assert len(first["error"].encode()) == 262_144
    assert len(second["error"].encode()) == 1_000


async def test_a_cancelled_task_cancels_its_run() -> None:
    car = FakeCar()
    entered = asyncio.Event()

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(2))
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(agent())
    await entered.wait()
    task.cancel("no more time")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert not isinstance(caught.value, RunCancelled)
    assert car.log == numbered(2)
    assert car.made("runs.cancel") == [{"run_id": "run-1", "reason": "its task was cancelled: no more time"}]


async def test_the_keyboard_cancels_the_run() -> None:
    car = FakeCar()
    run = run_of(car)
    await run.open(None)
    await run.close(KeyboardInterrupt())  # as the synchronous twin does; raised in a task it would end the loop
    assert car.made("runs.cancel") == [{"run_id": "run-1", "reason": "interrupted from the keyboard"}]


@pytest.mark.parametrize(("code", "ended"), [(0, "agent_end"), (2, "fail")])
async def test_a_program_that_exits_well_has_done_its_run(code: int, ended: str) -> None:
    car = FakeCar()
    run = run_of(car)
    await run.open(None)
    await run.close(SystemExit(code))
    assert [event["type"] for event in car.log] == (["agent_end"] if ended == "agent_end" else [])
    assert [call["error"] for call in car.made("runs.fail")] == ([] if ended == "agent_end" else ["SystemExit: 2"])


async def test_a_run_cancelled_from_outside_cancels_its_task_which_may_go_on_with_another() -> None:
    car = FakeCar()
    run = run_of(car)
    seen: list[str] = []

    async def agent() -> None:
        async with run:
            await run.record(*numbered(2))
            car.cancel("another", "run-2")
            car.cancel("enough")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                seen.append(str(error))
                await run.record({"type": "late"})
                raise

    with pytest.raises(RunCancelled, match="run-1 was cancelled: enough") as caught:
        await agent()
    assert caught.value.reason == run.cancel_reason == "enough"
    assert run.cancelled
    assert seen == ["run-1 was cancelled: enough"]
    assert car.log == [*numbered(2), {"type": "late"}]
    assert not car.made("runs.fail")
    assert not car.made("runs.cancel")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with asyncio.timeout(20):  # which cancels its task too, and knows its own
        await asyncio.sleep(0)


async def test_a_cancelled_run_cancels_the_task_group_in_it() -> None:
    car = FakeCar()
    ended: list[int] = []

    async def step(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def agent() -> None:
        async with run_of(car), asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(step(number))
            await asyncio.sleep(0)
            car.cancel("enough")

    with pytest.raises(RunCancelled):
        await agent()
    assert sorted(ended) == [0, 1, 2]


async def test_a_block_that_ends_well_all_the_same_leaves_the_cancelled_run_alone() -> None:
    car = FakeCar()
    async with run_of(car):
        car.cancel("enough")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    assert car.log == []


async def test_a_cancel_that_was_not_heard_shows_in_the_next_answer() -> None:
    car = FakeCar()
    car.run["cancel_reason"] = "while you were away"

    async def agent() -> None:
        async with run_of(car) as run:
            car.status = "cancelled"
            await run.record({"type": "step"})
            await asyncio.Event().wait()

    with pytest.raises(RunCancelled, match="while you were away"):
        await agent()


async def test_a_cancel_that_was_not_heard_shows_when_the_run_is_attended_again() -> None:
    car = FakeCar()
    car.run["cancel_reason"] = "while you were away"
    car.errors["runs.resume"] = [refusal(conflict("run_terminal", "it is cancelled"))]

    async def agent() -> None:
        async with run_of(car):
            car.status = "cancelled"
            await car.reconnect()
            await asyncio.Event().wait()

    with pytest.raises(RunCancelled, match="while you were away"):
        await agent()


async def test_a_cancel_that_comes_before_the_answer_to_the_creation_is_not_missed() -> None:
    class Hasty(FakeCar):
        async def _answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
            if method == "runs.create":
                self.cancel("another", "run-2")
                self.cancel("at once")
            return await super()._answer(method, params)

    run = run_of(Hasty())

    async def agent() -> None:
        async with run:
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await agent()
    assert run.cancel_reason == "at once"


async def test_a_run_that_records_is_attended_by_that_and_an_idle_one_is_attended_anew() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        await car.reconnect()
        await until(lambda: car.made("runs.resume"))
        await run.record({"type": "step"})
        await car.reconnect()
        await run.flush()
        await car.reconnect()
        await until(lambda: len(car.made("runs.resume")) == 2)
    assert len(car.made("runs.resume")) == 2


async def test_what_the_daemon_refuses_ends_the_block_with_its_words_and_fails_the_run() -> None:
    car = FakeCar()
    car.before = [refusal(limit_exceeded("event_bytes", 2_000_000, 1_048_576, "events[1]"))]

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(3))

    with pytest.raises(EventRefused, match=r"events\[1\]: 2000000 is more than event_bytes allows.*\"n\":1"):
        await agent()
    assert car.log == [{"type": "step", "n": 0}, {"type": "step", "n": 2}, END]
    assert "not everything was recorded" in car.run["error"]


async def test_what_was_not_recorded_is_a_note_on_the_exception_that_ends_the_block() -> None:
    car = FakeCar()
    car.before = [car.gone()]
    car.errors["runs.fail"] = [car.gone()]

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(3))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        await agent()
    assert caught.value.__notes__ == ["3 events of run-1 were not recorded: unknown run 'run-1'"]


async def test_an_end_that_cannot_be_told_is_said_to_be_missing() -> None:
    car = FakeCar()
    car.errors["runs.fail"] = [LOST]

    async def agent() -> None:
        async with run_of(car):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        await agent()
    assert caught.value.__notes__ == ["the end of run-1 was not recorded: connection lost (1006)"]


async def test_a_daemon_that_stays_away_is_waited_for_only_so_long() -> None:
    car = FakeCar(patience_s=0.05)

    async def agent() -> None:
        async with run_of(car) as run:
            car.open.clear()
            await run.record(*numbered(3))

    with pytest.raises(NotRecorded, match=r"4 events of run-1 were not recorded: .*waited 0\.05 s") as caught:
        await agent()
    assert caught.value.events == 4
    assert not car.log


async def test_a_block_that_is_cancelled_while_it_ends_says_what_it_leaves() -> None:
    car = FakeCar()

    async def agent() -> None:
        async with run_of(car) as run:
            car.open.clear()
            await run.record(*numbered(3))

    task = asyncio.create_task(agent())
    await car.asked.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert "4 events of run-1 were not recorded: its end was not waited for" in caught.value.__notes__[0]


async def test_a_run_whose_block_has_ended_takes_nothing_more() -> None:
    car = FakeCar()
    run = run_of(car)
    with pytest.raises(RunOver, match="not begun"):
        await run.record({"type": "step"})
    async with run:
        pass
    with pytest.raises(RunOver, match="the block of run-1 has ended"):
        await run.record({"type": "step"})
    with pytest.raises(RuntimeError, match="entered once"):
        await run.open(None)


async def test_a_run_that_cannot_be_created_leaves_nothing_behind() -> None:
    car = FakeCar()
    car.errors["runs.create"] = [refusal(conflict("key_reused", "this key made another run"))]

    async def agent() -> None:
        async with run_of(car, key="job-1"):
            pytest.fail("the block was entered")

    with pytest.raises(CallError, match="another run"):
        await agent()
    assert not car.link._told["runs.cancelled"]
    assert current_run() is None
