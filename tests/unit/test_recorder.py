"""How events get from a run's buffer to the daemon: in batches, in order, each once (`carserver.client.recorder`)."""

import asyncio
import itertools
import threading
from typing import Any

import pytest

from carserver.client import recorder
from carserver.client.buffer import BRACKETS, Buffer, entry, pieces
from carserver.client.errors import BufferFull, CallTimeout, ConnectionLost, EventRefused, NotAuthorised, NotRecorded
from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind, RpcError, limit_exceeded, not_found, overloaded, unavailable
from tests.unit.fakecar import LOST, FakeCar, numbered, refusal, run_of, until

END = {"type": "agent_end", "text": ""}


async def test_what_comes_while_a_batch_is_under_way_shares_the_next() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        car.open.clear()
        await run.record(*numbered(1))
        await car.asked.wait()
        for event in numbered(2_500, first=1):
            await run.record(event)
        car.open.set()
    assert car.log == [*numbered(2_501), END]
    assert [len(call["events"]) for call in car.made("runs.record")] == [1, 1_000, 1_000, 501]


async def test_a_batch_has_a_mebibyte_or_one_larger_event() -> None:
    car = FakeCar()
    sizes = [400_000, 400_000, 400_000, 3_000_000, 10]
    async with run_of(car) as run:
        car.open.clear()
        await run.record(*numbered(1))
        await car.asked.wait()
        await run.record(*({"type": "step", "x": "x" * size} for size in sizes))
        car.open.set()
    assert [len(call["events"]) for call in car.made("runs.record")] == [1, 2, 1, 1, 2]


async def test_a_batch_has_no_more_brackets_than_a_message_may_have() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        car.open.clear()
        await run.record(*numbered(1))
        await car.asked.wait()
        await run.record(*({"type": "step", "x": [[]] * (BRACKETS // 4)} for _ in range(6)))
        car.open.set()
    assert [len(call["events"]) for call in car.made("runs.record")] == [1, 3, 4]


async def test_what_comes_soon_after_a_batch_waits_for_more_unless_somebody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "TICK_S", 3_600)
    car = FakeCar()
    async with run_of(car) as run:
        await run.record(*numbered(1))
        await run.flush()
        for piece in "abc":
            await run.text(piece)
            for _ in range(20):
                await asyncio.sleep(0)
        assert len(car.made("runs.record")) == 1
        await run.flush()
        assert car.log == [*numbered(1), {"type": "text_delta", "text": "abc"}]
        await run.record(*numbered(1_000))  # a whole batch waits for nothing
        await until(lambda: len(car.log) == 1_002)


async def test_events_keep_the_time_at_which_they_were_recorded() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        car.open.clear()
        await run.record(*numbered(1))
        await asyncio.sleep(0.02)
        await run.record(*numbered(1))
        car.open.set()
    assert car.at_ms[1] - car.at_ms[0] >= 10


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        CallTimeout("late"),
        NotAuthorised("a token that is just being changed"),
        refusal(overloaded("much", 1)),
        refusal(unavailable("draining", outcome="unknown")),
        refusal(RpcError(ErrorKind.DEADLINE_EXCEEDED, "slow")),
        refusal(RpcError(ErrorKind.PARSE_ERROR, "somebody else's message was no JSON")),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [False, True])
async def test_a_batch_whose_outcome_is_unknown_is_sent_again_as_it_was(error: Exception, stored: bool) -> None:
    car = FakeCar()
    async with run_of(car) as run:
        (car.after if stored else car.before).append(error)
        await run.record(*numbered(3))
        await car.asked.wait()
        await run.record(*numbered(3, first=3))
    assert car.log == [*numbered(6), END]
    first, second, third = car.made("runs.record")
    assert first == second
    assert third["batch_id"] != first["batch_id"]


async def test_a_refused_event_is_left_out_and_told_once_and_the_rest_goes_on() -> None:
    car = FakeCar()
    car.before = [refusal(limit_exceeded("event_bytes", 9, 8, "events[1]")) for _ in range(2)]
    async with run_of(car) as run:
        await run.record(*numbered(5))
        with pytest.raises(EventRefused, match=r"9 is more than event_bytes allows \(8\).*\(and 1 more\)") as caught:
            await run.flush()
        await run.record({"type": "after"})
    assert caught.value.event == b'{"type":"step","n":1}'
    assert car.log == [*numbered(1), *numbered(2, first=3), {"type": "after"}, END]


async def test_who_records_next_is_told_and_has_nothing_taken_in() -> None:
    car = FakeCar()
    car.before = [refusal(limit_exceeded("event_bytes", 9, 8, "events[0]"))]
    async with run_of(car) as run:
        await run.record(*numbered(1))
        await until(lambda: run.recorder._refused)
        with pytest.raises(EventRefused):
            await run.record({"type": "not taken"})
        await run.record({"type": "taken"})
    assert car.log == [{"type": "taken"}, END]


@pytest.mark.parametrize("thread", [False, True])
async def test_who_waits_for_room_has_all_taken_in_and_is_told_of_a_refusal_afterwards(thread: bool) -> None:
    car = FakeCar()
    car.before = [refusal(limit_exceeded("event_bytes", 9, 8, "events[0]"))]
    async with run_of(car, buffer_events=10) as run:
        if thread:
            await asyncio.to_thread(run.record_from_thread, *numbered(35))
        else:
            await run.record(*numbered(35))
        with pytest.raises(EventRefused):
            await run.flush()
    assert car.log == [*numbered(34, first=1), END]


async def test_a_batch_over_a_limit_is_sent_in_halves() -> None:
    car = FakeCar()

    def few(params: dict[str, Any]) -> None:
        car.before.append(few)
        if len(params["events"]) > 2:
            raise refusal(limit_exceeded("record_events", len(params["events"]), 2, "events"))

    car.before = [few]
    async with run_of(car) as run:
        await run.record(*numbered(9))
    assert car.log == [*numbered(9), END]


@pytest.mark.parametrize(
    "error",
    [refusal(limit_exceeded("run_events", 2, 1)), refusal(not_found("run", "run-1")), RuntimeError("a defect")],
    ids=["full", "deleted", "defect"],
)
async def test_what_no_event_is_to_blame_for_ends_the_recording_and_is_told_every_time(error: Exception) -> None:
    car = FakeCar()
    car.before = [error]

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(4))
            for _ in range(2):
                with pytest.raises(NotRecorded, match="4 events of run-1 were not recorded") as caught:
                    await run.flush()
                assert caught.value.events == 4
            with pytest.raises(NotRecorded):
                await run.record({"type": "after"})

    with pytest.raises(NotRecorded, match="5 events of run-1 were not recorded"):
        await agent()
    assert not car.log
    assert len(car.made("runs.record")) == 1


async def test_a_batch_that_ends_its_connections_again_and_again_is_not_sent_for_ever() -> None:
    car = FakeCar()
    car.before = [ConnectionLost(Close.TOO_BIG, "message")] * 3

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(1))
            await until(lambda: run.recorder.broken)

    with pytest.raises(NotRecorded, match=r"connection lost.*what became of the 1 that were sent last is not known"):
        await agent()
    assert len(car.made("runs.record")) == 3


# Where there is no room.


async def test_who_waits_for_room_gets_it_in_turn() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=10) as run:
        car.open.clear()
        await run.record(*numbered(10))
        waiting = [asyncio.create_task(run.record(event)) for event in numbered(25, first=10)]
        await car.asked.wait()
        with pytest.raises(BufferFull, match=r"10 events \(\d+ bytes\) of run-1 wait .* room for 10 "):
            run.record_nowait({"type": "no room"})
        assert not any(task.done() for task in waiting)
        car.open.set()
        await asyncio.gather(*waiting)
    assert car.log == [*numbered(35), END]


async def test_nobody_overtakes_who_waits_for_room() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=10) as run:
        car.open.clear()
        await run.record(*numbered(10))
        waiting = asyncio.create_task(run.record({"type": "first"}))
        await car.asked.wait()
        run._buffer.events = 20  # there is room, of which who waits has not heard yet
        with pytest.raises(BufferFull):
            run.record_nowait({"type": "second"})
        second = asyncio.create_task(run.record({"type": "second"}))
        car.open.set()
        await asyncio.gather(waiting, second)
    assert car.log == [*numbered(10), {"type": "first"}, {"type": "second"}, END]


async def test_more_events_at_once_than_there_ever_is_room_for_are_taken_in_as_room_comes() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=10) as run:
        await run.record(*numbered(35))
        await run.text("x" * 150_000)
    texts = [event["text"] for event in car.log[35:-1]]
    assert car.log[:35] == numbered(35)
    assert "".join(texts) == "x" * 150_000


async def test_bytes_count_too_and_one_larger_event_has_room_when_there_is_nothing_else() -> None:
    car = FakeCar()
    large = {"type": "step", "x": "x" * 5_000}
    async with run_of(car, buffer_bytes=1_000, waits=False) as run:
        car.open.clear()
        await run.record(large)
        with pytest.raises(BufferFull, match="room for 10000 "):
            await run.record(*numbered(1))
        with pytest.raises(BufferFull):
            await run.text("a")
        car.open.set()
        await run.flush()
        await run.record(large)
    assert car.log == [large, large, END]


async def test_where_it_does_not_wait_all_of_the_events_are_taken_in_or_none() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=10, waits=False) as run:
        car.open.clear()
        await run.record(*numbered(8))
        with pytest.raises(BufferFull) as caught:
            await run.record(*numbered(3, first=8))
        assert caught.value.taken == 0
        await run.record(*numbered(2, first=8))
        car.open.set()
    assert car.log == [*numbered(10), END]


async def test_where_it_does_not_wait_a_thread_does_not_either() -> None:
    car = FakeCar(patience_s=3_600)
    async with run_of(car, buffer_events=10, waits=False) as run:
        car.open.clear()
        await run.record(*numbered(9))
        with pytest.raises(BufferFull):
            await asyncio.to_thread(run.record_from_thread, *numbered(2))
        car.open.set()
    assert car.log == [*numbered(9), END]


async def test_who_waits_for_room_that_does_not_come_is_told_how_much_was_taken_in() -> None:
    car = FakeCar(patience_s=0.05)

    async def agent() -> None:
        async with run_of(car, buffer_events=10) as run:
            car.open.clear()
            with pytest.raises(BufferFull) as caught:
                await run.record(*numbered(14))
            assert caught.value.taken == 10
            with pytest.raises(BufferFull):
                await asyncio.to_thread(run.record_from_thread, {"type": "step"})

    with pytest.raises(NotRecorded, match="11 events"):
        await agent()


async def test_a_thread_is_told_how_much_was_taken_in_too() -> None:
    car = FakeCar(patience_s=0.05)

    async def agent() -> None:
        async with run_of(car, buffer_events=10) as run:
            car.open.clear()
            with pytest.raises(BufferFull) as caught:
                await asyncio.to_thread(run.record_from_thread, *numbered(14))
            assert caught.value.taken == 10

    with pytest.raises(NotRecorded, match="11 events"):
        await agent()


async def test_who_waits_for_room_is_told_when_recording_ends() -> None:
    car = FakeCar()

    async def agent() -> None:
        async with run_of(car, buffer_events=10) as run:
            car.open.clear()
            car.before = [car.gone()]
            await run.record(*numbered(10))
            waiting = asyncio.create_task(run.record({"type": "step"}))
            thread = asyncio.create_task(asyncio.to_thread(run.record_from_thread, {"type": "step"}))
            await car.asked.wait()
            await asyncio.sleep(0)
            car.open.set()
            for task in (waiting, thread):
                with pytest.raises(NotRecorded):
                    await task

    with pytest.raises(NotRecorded):
        await agent()


async def test_a_thread_that_is_about_to_wait_for_room_is_told_too() -> None:
    car, loop = FakeCar(patience_s=0.05), asyncio.get_running_loop()

    async def agent() -> None:
        async with run_of(car, buffer_events=10) as run:
            car.open.clear()
            await run.record(*numbered(10))
            check, checks, ended = run.recorder._check_broken, itertools.count(1), threading.Event()

            def check_just_before_it_ends() -> None:
                check()
                if next(checks) == 2:  # the last one before it asks for room
                    loop.call_soon_threadsafe(run.recorder.give_up, "gone")
                    loop.call_soon_threadsafe(ended.set)
                    assert ended.wait(20)

            run.recorder._check_broken = check_just_before_it_ends  # type: ignore[method-assign]
            with pytest.raises(NotRecorded, match="gone"):
                await asyncio.to_thread(run.record_from_thread, {"type": "step"})
            assert ended.is_set()

    with pytest.raises(NotRecorded, match="gone"):
        await agent()


async def test_threads_record_too_and_wait_for_room() -> None:
    car = FakeCar()
    async with run_of(car, buffer_events=50) as run:

        def record(thread: int) -> None:
            for number in range(200):
                run.record_from_thread({"type": "step", "thread": thread, "n": number})

        await asyncio.gather(*(asyncio.to_thread(record, thread) for thread in range(4)))
    for thread in range(4):
        assert [event["n"] for event in car.log[:-1] if event["thread"] == thread] == list(range(200))
    assert len(car.log) == 801


async def test_a_thread_wakes_what_sends() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        await asyncio.to_thread(run.record_from_thread, *numbered(1))
        await until(lambda: car.log)


async def test_nothing_blocks_the_loop() -> None:
    car = FakeCar()
    async with run_of(car) as run:
        with pytest.raises(RuntimeError, match=r"await run\.record"):
            run.record_from_thread({"type": "step"})
        with pytest.raises(RuntimeError, match=r"await run\.record"):
            run.text_from_thread("a")


async def test_a_car_that_is_closed_within_the_block_ends_the_recording() -> None:
    car = FakeCar()

    async def agent() -> None:
        async with run_of(car) as run:
            await run.record(*numbered(3))
            for callback in car.link._closing:
                await callback()
            assert car.log == numbered(3)
            run.recorder.put_beyond(entry({"type": "late"}, 0))

    with pytest.raises(NotRecorded, match=r"2 events of run-1 .* the car was closed"):
        await agent()


def test_a_buffer_accounts_for_every_byte() -> None:
    buffer = Buffer(100, 10_000)
    for piece in pieces("é\n" * 40):
        buffer.write(piece, 1)
    buffer.put([entry({"type": "step"}, 2), entry({"type": "step", "x": "ü"}, 3)], whole=True)
    buffer.write(pieces("more")[0], 4)
    taken = buffer.take(100, 10_000)
    assert [one.at_ms for one in taken] == [1, 2, 3, 4]
    assert (buffer.held, buffer.held_bytes, buffer.waiting) == (4, sum(len(one.raw) for one in taken), 0)
    buffer.release(taken)
    assert (buffer.held, buffer.held_bytes, buffer.total) == (0, 0, 4)


def test_a_thread_that_waits_for_room_is_woken_by_what_was_released_meanwhile() -> None:
    buffer = Buffer(1, 1_000)
    buffer.put([entry({"type": "step"}, 0)], whole=True)
    changes = buffer.changes
    taken = buffer.take(1, 1_000)
    thread = threading.Thread(target=buffer.release, args=[taken])
    thread.start()
    assert buffer.wait(changes, 20)
    thread.join()
    assert not buffer.wait(buffer.changes, 0.001)
