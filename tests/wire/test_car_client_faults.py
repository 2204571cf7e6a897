"""The real client of the CAR dialect where it is hard: lost connections, dead daemons, large frames, late readers."""

import asyncio
import contextlib
import random
from typing import Any

import pytest

from tests.carclient import CarClient, CarError, Notified, car_client, needs_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.fault.cutting import cutting
from tests.peer import Peer, peer
from tests.trace import text
from tests.unit.proposing import action

pytestmark = needs_car

MIB = 1024 * 1024
EVENTS, BATCH, PAD = 20_000, 1_000, 200  # 9 MB: more than the kernel and the daemon keep for one who reads nothing
HANDLER_S = 0.002
TURNS = [{"prompt": "look"}, {"tool": "grep", "output": {"found": 3}}]
SUCCESS = {"status": "success", "summary": "done"}


async def started(car: CarClient) -> str:
    """A run of its own."""
    run_id: str = (await car.call("runs_start", {"intent": "look", "agent_name": "Looker"}))["run_id"]
    return run_id


# --------------------------------------------------------------------------------------------------- lost connections


@pytest.mark.parametrize("how", ["the connection is cut", "the daemon is killed"])
async def test_a_call_fails_at_once_and_the_client_resumes_its_run_and_completes_it_and_the_log_is_whole(
    how: str, daemon: Daemon
) -> None:
    async with cutting(daemon.url, random.Random(5)) as proxy, car_client(daemon, CAR_DAEMON_URL=proxy.url) as car:
        run_id = await started(car)
        await car.call("register_tool", "look")
        await car.call("runs_record_turns", {"run_id": run_id, "turns": TURNS})
        epoch = await car.call("connection_epoch")
        chain = {"actions": [action("a", tool="look"), action("b", tool="look", dependencies=["a"])]}
        submitted = car.start("submit_proposal", chain)
        lost = await car.asked()
        if how == "the connection is cut":
            proxy.cut_all()
        else:
            daemon.kill()
            proxy.lead_to(daemon.start().url)
        with pytest.raises(CarError, match=r"rpc channel closed for proposal\.submit"):
            await submitted
        await lost.answers({"to": "nobody"})

        await car.reconnected(epoch)
        assert (await car.call("runs_resume", {"run_id": run_id}))["run_id"] == run_id
        assert (await car.call("runs_record_turns", {"run_id": run_id, "turns": TURNS}))["ok"]
        await car.call("register_tool", "look")
        car.tools["look"] = lambda _: {"found": 1}
        statuses = [result["status"] for result in (await car.call("submit_proposal", chain))["results"]]
        assert statuses == ["succeeded", "succeeded"]
        assert (await car.call("runs_complete", {"run_id": run_id, "outcome": SUCCESS}))["ok"]
        records = (await car.call("runs_get_trace", {"run_id": run_id}))["records"]
    first, *log, last = records
    assert (first["record"], last["record"], last["run_status"]) == ("started", "ended", "completed")
    assert [record["index" if "index" in record else "sequence"] for record in log] == list(range(len(log)))
    assert [turn.get("prompt") for turn in log].count("look") == 2
    events = [record["event"] for record in log if record["record"] == "event"]
    starts = [event["id"] for event in events if event["type"] == "tool_start"]
    ends = {event["id"]: event.get("error") for event in events if event["type"] == "tool_end"}
    assert len(starts) == len(set(starts)) == 3
    assert list(ends) == starts
    why = "the host's connection ended" if how == "the connection is cut" else "the daemon was restarted"
    assert why in (ends[starts[0]] or "")
    assert [ends[start] for start in starts[1:]] == [None, None]


# -------------------------------------------------------------------------------------------------------- large frames


async def test_ten_mebibytes_go_each_way_and_come_whole(served: Daemon) -> None:
    async with car_client(served) as car:
        run_id = await started(car)
        await car.call("register_tool", "echo")
        car.tools["echo"] = lambda parameters: {"back": parameters["text"]}
        large = "0123456789abcdef" * (10 * MIB // 16)
        answer = await car.call("submit_proposal", {"actions": [action("a", tool="echo", parameters={"text": large})]})
        (result,) = answer["results"]
        assert result["status"] == "succeeded"
        assert result["output"] == {"back": large}

        turned = await car.call("runs_record_turns", {"run_id": run_id, "turns": [{"prompt": "p", "output": large}]})
        assert turned["ok"]
        records = (await car.call("runs_get_trace", {"run_id": run_id}))["records"]
        (turn,) = (record for record in records if record.get("prompt") == "p")
        assert turn["output"].endswith("…[truncated]")
        assert large.startswith(turn["output"].removesuffix("…[truncated]"))


# -------------------------------------------------------------------------------------------------------- late readers


async def recorded(producer: Peer, run_id: str) -> None:
    """All events; each batch is acknowledged before the next one is sent."""
    for first in range(0, EVENTS, BATCH):
        await producer.record(run_id, *(text(number, PAD) for number in range(first, first + BATCH)))


async def until_ended(car: CarClient) -> list[Notified]:
    """What its handler got, up to the record `ended`."""
    found = [await car.notified()]
    while found[-1].params["record"]["record"] != "ended":
        found += [await car.notified(), *car.notified_so_far()]
    return found


def shown(notified: Notified) -> tuple[str, int, Any]:
    """Kind, cursor, and the number of an event."""
    record = notified.params["record"]
    return record["record"], notified.params["cursor"], record.get("event", {}).get("n")


WHOLE = [("event", number + 1, number) for number in range(EVENTS)]
ENDED = ("ended", EVENTS, None)


async def test_a_slow_client_and_one_that_stands_still_for_a_while_get_every_event_once_and_hold_up_nobody(
    start: StartDaemon,
) -> None:
    daemon = start(write_s=300)  # whoever stands still is back sooner
    async with peer(daemon) as producer, car_client(daemon) as slow, car_client(daemon) as still:
        run_id = (await producer.create())["id"]
        for car, pause_s in ((slow, HANDLER_S), (still, 0.0)):
            await car.listen("runs.trace.event", pause_s=pause_s)
            assert (await car.call("runs_subscribe", {"run_id": run_id}))["cursor"] == 0
        still.pause()
        await recorded(producer, run_id)
        await producer.call("runs.fail", {"run_id": run_id, "error": "enough"})
        await daemon.until("subscription_overflows", 1)
        still.resume()
        assert await slow.daemon_call("server.ping")  # its handler has most of them before it, and holds up nothing
        await slow.hurry()
        for got in await asyncio.gather(until_ended(slow), until_ended(still)):
            assert [shown(one) for one in got] == [("started", 0, None), *WHOLE, ENDED]
    assert daemon.metrics()["write_timeouts"] == 0


async def test_a_client_that_stands_still_for_too_long_is_cut_off_and_reads_the_log_on_its_next_connection(
    start: StartDaemon,
) -> None:
    daemon = start(write_s=0.3, whole_trace_bytes=MIB)  # which a busy client, too, reads in that time
    async with peer(daemon) as producer, car_client(daemon) as still:
        run_id = (await producer.create())["id"]
        await still.listen("runs.trace.event")
        await still.call("runs_subscribe", {"run_id": run_id})
        epoch = await still.call("connection_epoch")
        still.pause()
        await recorded(producer, run_id)
        await producer.call("runs.fail", {"run_id": run_id, "error": "enough"})
        await daemon.until("write_timeouts", 1)
        still.resume()
        await still.reconnected(epoch)
        records: list[dict[str, Any]] = []
        cursor = 0
        while not records or records[-1]["record"] != "ended":
            with contextlib.suppress(CarError):  # on a busy machine it may be cut off in the middle of a page, too
                page = await still.call("runs_get_trace", {"run_id": run_id, "cursor": cursor})
                records += page["records"]
                cursor = page["cursor"]
        assert cursor == EVENTS
        assert [record["record"] for record in (records[0], records[-1])] == ["started", "ended"]
        assert [(record["sequence"], record["event"]["n"]) for record in records[1:-1]] == [
            (number, number) for number in range(EVENTS)
        ]
        before = [shown(one) for one in still.notified_so_far()]
        assert before == [("started", 0, None), *WHOLE][: len(before)]  # what was on its way to it
