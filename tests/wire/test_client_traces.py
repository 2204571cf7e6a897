"""`car.runs.trace` with a real daemon: beside calls, over a restart, over interruptions, and to its other ends."""

import asyncio
from contextlib import aclosing

import pytest

from carserver.client import CallError, ConnectionLost, Traced, TraceReset
from carserver.client.car import Car, connect
from carserver.client.connection import NOTIFICATIONS, OVERFLOW
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import peer
from tests.trace import text

END = {"type": "agent_end", "text": "done"}
MANY = 2 * NOTIFICATIONS * OVERFLOW // 1_000 * 1_000  # events; a connection with calls takes in half as many unread


def car_of(daemon: Daemon) -> Car:
    return connect(state_dir=daemon.state)


def shown(records: list[Traced]) -> list[tuple[str, int]]:
    return [(record.kind, record.cursor) for record in records]


async def test_a_trace_that_nobody_reads_on_does_not_hold_up_the_calls_and_is_whole_in_the_end(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        run_id = (await car.runs.create("much")).id
        for first in range(0, MANY, 1_000):
            await car.runs.record(run_id, [text(first + n) for n in range(1_000)])
        await car.runs.record(run_id, [END])
        async with aclosing(car.runs.trace(run_id)) as records:
            read = [await anext(records)]
            for _ in range(20):
                assert (await car.runs.get(run_id)).event_count == MANY + 1
            read += [record async for record in records]
    assert shown(read) == [("started", 0), *[("event", n + 1) for n in range(MANY + 1)], ("ended", MANY + 1)]
    assert [record.record["event"]["n"] for record in read[1:-2]] == list(range(MANY))


async def test_two_traces_of_one_run_are_each_whole(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        run_id = (await car.runs.create("twice")).id

        async def read() -> list[tuple[str, int]]:
            return shown([record async for record in car.runs.trace(run_id)])

        readers = [asyncio.create_task(read()) for _ in range(2)]
        await daemon.until("subscriptions", 2)
        await car.runs.record(run_id, [text(0), END])
        assert await asyncio.gather(*readers) == [[("started", 0), ("event", 1), ("event", 2), ("ended", 2)]] * 2


async def test_a_trace_goes_on_when_the_daemon_was_killed_and_one_may_begin_while_it_is_away(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        run_id = (await car.runs.create("restarted")).id
        await car.runs.record(run_id, [text(0)])
        records = car.runs.trace(run_id)
        read = [await anext(records), await anext(records)]
        daemon.kill()
        later = asyncio.create_task(anext(car.runs.trace(run_id)))
        await asyncio.to_thread(daemon.start)
        await car.runs.record(run_id, [text(1), END], batch_id="again")
        read += [record async for record in records]
        assert shown([await later]) == [("started", 0)]
    assert shown(read) == [("started", 0), ("event", 1), ("event", 2), ("event", 3), ("ended", 3)]


async def test_a_trace_ends_with_an_interruption_and_the_next_goes_on_from_there(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    async with car_of(daemon) as car:
        async with peer(daemon) as owner:
            run_id = (await owner.create())["id"]
            await owner.record(run_id, text(0))
        read = [record async for record in car.runs.trace(run_id)]
        assert shown(read) == [("started", 0), ("event", 1), ("ended", 1)]
        assert read[-1].run_status == "interrupted"
        await car.runs.record(run_id, [text(1), END])
        rest = car.runs.trace(run_id, cursor=read[-1].cursor, epoch=read[-1].epoch)
        assert shown([record async for record in rest]) == [("event", 2), ("event", 3), ("ended", 3)]


async def test_a_deleted_run_an_unknown_one_and_another_log_are_named(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        run = await car.runs.create("first", idempotency_key="k")
        await car.runs.record(run.id, [text(0)])
        await car.runs.cancel(run.id)
        records = car.runs.trace(run.id)
        assert shown([await anext(records) for _ in range(2)]) == [("started", 0), ("event", 1)]
        await records.aclose()
        await car.runs.delete(run.id)
        with pytest.raises(CallError, match=f"unknown run '{run.id}'") as unknown:
            await anext(car.runs.trace(run.id))
        assert unknown.value.type == "not_found"
        again = await car.runs.create("first", idempotency_key="k")
        assert (again.id, again.epoch) != (run.id, run.epoch)
        await car.runs.record(run.id, [text(0)])
        with pytest.raises(TraceReset, match=run.id):
            await anext(car.runs.trace(run.id, cursor=1, epoch=run.epoch))


async def test_a_trace_ends_with_its_car(daemon: Daemon) -> None:
    async with car_of(daemon) as car:
        run_id = (await car.runs.create("left")).id
        quiet, unread, later = (car.runs.trace(run_id) for _ in range(3))
        assert shown([await anext(quiet), await anext(unread)]) == [("started", 0)] * 2
        waiting = asyncio.create_task(anext(quiet))
        await car.server.ping()
    for record in (waiting, anext(unread), anext(later)):
        with pytest.raises(ConnectionLost, match="closed by this side"):
            await record
