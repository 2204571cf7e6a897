"""What one subscription to a live trace promises (contract, section 7, rules 1 to 6), over real sockets."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.rawpeer import raw_peer
from tests.trace import (
    ask,
    nothing_waits,
    shown,
    sized,
    subscribe,
    take,
    text,
    until_answer,
    until_at_most,
    until_ended,
)

GRACE_S = 0.3
SMALL = 4_096  # bytes of the kernel's buffers, about
END = {"type": "agent_end", "text": "done"}


async def recorded(agent: Peer, *events: Any) -> str:
    """A new run with these events."""
    run_id: str = (await agent.create("watch me"))["id"]
    if events:
        await agent.record(run_id, *events)
    return run_id


def events_shown(first: int, last: int, status: str = "created") -> list[tuple[str, int, str]]:
    """Event records with these cursors."""
    return [("event", cursor, status) for cursor in range(first, last + 1)]


STARTED = ("started", 0, "created")


# Where a stream begins.


async def test_a_stream_from_0_begins_with_the_run_as_it_was_created(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run = await agent.create("watch me", agent_id="coder", outcome_description="it works")
        await agent.record(run["id"], {"type": "planning_start"})
        answer = await subscribe(viewer, run["id"])
        assert answer["run"] == await agent.call("runs.get", {"run_id": run["id"]})
        assert (answer["cursor"], answer["epoch"], answer["recovered"]) == (0, run["epoch"], False)
        (started, event) = await take(viewer, 2)
        started_at = started["record"].pop("started_at")
        assert started_at.endswith("Z")
        assert started == {
            "run_id": run["id"],
            "agent_id": "coder",
            "record": {
                "record": "started",
                "run_id": run["id"],
                "agent_id": "coder",
                "intent": "watch me",
                "outcome_description": "it works",
            },
            "cursor": 0,
            "status": "in_progress",
            "run_status": "created",
        }
        timestamp_ms = event["record"].pop("timestamp_ms")
        assert timestamp_ms >= run["created_at_ms"]
        assert event == {
            "run_id": run["id"],
            "agent_id": "coder",
            "record": {"record": "event", "sequence": 0, "event": {"type": "planning_start"}},
            "cursor": 1,
            "status": "in_progress",
            "run_status": "planning",
        }


async def test_a_stream_goes_on_at_a_cursor_of_the_same_epoch(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *map(text, range(5)))
        epoch = (await subscribe(viewer, run_id))["epoch"]
        await take(viewer, 3)
        async with peer(daemon) as again:
            answer = await subscribe(again, run_id, cursor=2, epoch=epoch)
            assert (answer["cursor"], answer["recovered"]) == (2, True)
            assert shown(await take(again, 3)) == events_shown(3, 5)
            await nothing_waits(again)


async def test_a_stream_that_goes_on_at_the_very_head_has_only_what_comes_next(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *map(text, range(5)))
        epoch = (await agent.call("runs.get", {"run_id": run_id}))["epoch"]
        answer = await subscribe(viewer, run_id, cursor=5, epoch=epoch)
        assert (answer["cursor"], answer["recovered"]) == (5, True)
        await nothing_waits(viewer)
        await agent.record(run_id, text(5))
        assert shown(await take(viewer, 1)) == events_shown(6, 6)
        assert (await asyncio.to_thread(daemon.metrics))["catch_up_pages"] == 0


@pytest.mark.parametrize(
    ("cursor", "own_epoch"),
    [(3, False), (0, False), (6, True), (2**53, True)],
    ids=["foreign", "foreign-0", "beyond", "far"],
)
async def test_a_stream_that_cannot_go_on_comes_again_from_0_and_says_so(
    daemon: Daemon, cursor: int, own_epoch: bool
) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *map(text, range(5)))
        own = (await agent.call("runs.get", {"run_id": run_id}))["epoch"]
        answer = await subscribe(viewer, run_id, cursor=cursor, epoch=own if own_epoch else "another's")
        assert (answer["cursor"], answer["recovered"], answer["epoch"]) == (0, False, own)
        assert shown(await take(viewer, 6)) == [STARTED, *events_shown(1, 5)]


@pytest.mark.parametrize(
    ("params", "path"), [({"cursor": 1}, "epoch"), ({"cursor": -1}, "cursor"), ({"epoch": 7}, "epoch")]
)
async def test_a_place_that_makes_no_sense_is_refused_by_name(
    daemon: Daemon, params: dict[str, Any], path: str
) -> None:
    async with peer(daemon) as agent:
        run_id = await recorded(agent, text(0))
        with pytest.raises(Refused) as refused:
            await subscribe(agent, run_id, **params)
        assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", path)
        await nothing_waits(agent)
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 0


# Replies and frames in their order.


async def test_the_answer_to_a_whole_batch_comes_before_the_first_frame_of_its_streams(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        one = await recorded(agent, *map(text, range(30)))
        other = await recorded(agent, *map(text, range(20)), END)
        calls = [
            {"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": {"run_id": one}},
            {"jsonrpc": "2.0", "id": 2, "method": "runs.trace.subscribe", "params": {"run_id": other}},
            # It waits for storage, and everything in front waits with it.
            {"jsonrpc": "2.0", "id": 3, "method": "runs.create", "params": {"prompt": "the batch takes its time"}},
        ]
        answers = await viewer.raw(json.dumps(calls))
        assert type(answers) is list, "a frame came first"
        assert {answer["id"] for answer in answers} == {1, 2, 3}
        assert all("result" in answer for answer in answers)
        streams: dict[str, list[dict[str, Any]]] = {one: [], other: []}
        for params in await take(viewer, 31 + 23):
            streams[params["run_id"]].append(params)
        assert shown(streams[one]) == [STARTED, *events_shown(1, 30)]
        assert shown(streams[other]) == [
            STARTED,
            *events_shown(1, 20),
            ("event", 21, "completed"),
            ("ended", 21, "completed"),
        ]
        await nothing_waits(viewer)


async def test_of_two_subscriptions_to_one_run_in_a_batch_the_second_counts(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *map(text, range(4)))
        epoch = (await agent.call("runs.get", {"run_id": run_id}))["epoch"]
        places = [{}, {"cursor": 3, "epoch": epoch}]
        calls = [
            {"jsonrpc": "2.0", "id": n, "method": "runs.trace.subscribe", "params": {"run_id": run_id, **place}}
            for n, place in enumerate(places)
        ]
        answers = await viewer.raw(json.dumps(calls))
        assert [answer["result"]["cursor"] for answer in answers] == [0, 3]
        assert shown(await take(viewer, 1)) == events_shown(4, 4)
        await nothing_waits(viewer)
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 1


async def test_a_second_subscription_on_a_connection_replaces_the_first_without_repeating_anything(
    daemon: Daemon,
) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *[text(n, 500) for n in range(1_000)])
        epoch = (await subscribe(viewer, run_id))["epoch"]
        (await take(viewer, 100))
        producing = [agent.start("runs.record", {"run_id": run_id, "events": [text(n)]}) for n in range(1_000, 1_050)]
        await ask(viewer, "again", "runs.trace.subscribe", {"run_id": run_id, "cursor": 500, "epoch": epoch})
        before, answer = await until_answer(viewer, "again")
        assert [params["cursor"] for params in before] == list(range(100, 100 + len(before)))
        assert answer["result"]["cursor"] == 500
        assert [params["cursor"] for params in await take(viewer, 550)] == list(range(501, 1_051))
        await asyncio.gather(*producing)
        await nothing_waits(viewer)
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 1


async def test_a_producer_that_watches_itself_sees_its_events_before_their_acknowledgement(daemon: Daemon) -> None:
    async with peer(daemon) as agent:
        run_id = await recorded(agent)
        await subscribe(agent, run_id)
        await take(agent, 1)
        for n in range(0, 60, 3):
            await ask(agent, f"r{n}", "runs.record", {"run_id": run_id, "events": [text(n), text(n + 1), text(n + 2)]})
        seen: list[int] = []
        for n in range(0, 60, 3):
            before, answer = await until_answer(agent, f"r{n}")
            seen += [params["cursor"] for params in before]
            assert answer["result"]["cursor"] == n + 3
            assert len(seen) >= n + 3, "acknowledged before it was seen"
        assert seen == list(range(1, 61))


async def test_the_end_too_is_seen_before_its_acknowledgement(daemon: Daemon) -> None:
    async with peer(daemon) as agent:
        run_id = await recorded(agent)
        await subscribe(agent, run_id)
        await ask(agent, "end", "runs.record", {"run_id": run_id, "events": [END, text(1)]})
        before, answer = await until_answer(agent, "end")
        assert shown(before) == [
            STARTED,
            ("event", 1, "completed"),
            ("event", 2, "completed"),
            ("ended", 2, "completed"),
        ]
        assert answer["result"]["status"] == "completed"


# How a stream ends, for a while or for good.


async def test_a_run_that_is_over_is_told_from_its_beginning_to_its_end_once(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, *map(text, range(3)), END)
        answer = await subscribe(viewer, run_id)
        assert (answer["run"]["status"], answer["cursor"]) == ("completed", 0)
        stream = await until_ended(viewer)
        assert shown(stream) == [
            STARTED,
            *events_shown(1, 3),
            ("event", 4, "completed"),
            ("ended", 4, "completed"),
        ]
        await nothing_waits(viewer)


async def by_its_agent(agent: Peer, run_id: str) -> None:
    await agent.record(run_id, END)


async def by_an_error(agent: Peer, run_id: str) -> None:
    await agent.record(run_id, {"type": "error", "message": "no model"})


async def by_fail(agent: Peer, run_id: str) -> None:
    await agent.call("runs.fail", {"run_id": run_id, "error": "no budget"})


async def by_cancel(agent: Peer, run_id: str) -> None:
    await agent.call("runs.cancel", {"run_id": run_id, "reason": "no need"})


async def by_leaving(agent: Peer, run_id: str) -> None:
    await agent.socket.close()


ENDINGS = [
    pytest.param(by_its_agent, 3, "completed", "completed", {"result_text": "done"}, id="agent_end"),
    pytest.param(by_an_error, 3, "completed", "failed", {"error": "no model"}, id="error"),
    pytest.param(by_fail, 2, "completed", "failed", {"error": "no budget"}, id="fail"),
    pytest.param(by_cancel, 2, "completed", "cancelled", {}, id="cancel"),
    pytest.param(by_leaving, 2, "incomplete", "interrupted", {}, id="grace"),
]


@pytest.mark.parametrize(("end", "cursor", "status", "run_status", "says"), ENDINGS)
async def test_a_live_stream_says_that_its_run_is_over_and_how(
    start: StartDaemon,
    end: Callable[[Peer, str], Coroutine[Any, Any, None]],
    cursor: int,
    status: str,
    run_status: str,
    says: dict[str, str],
) -> None:
    daemon = start(grace_s=GRACE_S)
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, text(0), text(1))
        await subscribe(viewer, run_id)
        await take(viewer, 3)
        await end(agent, run_id)
        *events, ended = await until_ended(viewer)
        assert len(events) == cursor - 2
        assert (ended["cursor"], ended["status"], ended["run_status"]) == (cursor, status, run_status)
        ended_at = ended["record"].pop("ended_at")
        assert ended_at.endswith("Z")
        assert ended["record"] == {"record": "ended", "run_id": run_id, "run_status": run_status, **says}
        snapshot = await viewer.call("runs.get", {"run_id": run_id})
        assert snapshot["status"] == run_status
        await nothing_waits(viewer)


async def test_late_events_follow_the_end_and_do_not_repeat_it(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent)
        await subscribe(viewer, run_id)
        await agent.record(run_id, END)
        await until_ended(viewer)
        await agent.record(run_id, text(1), {"type": "error", "message": "too late"})
        await agent.call("runs.fail", {"run_id": run_id, "error": "too late"})
        await agent.call("runs.cancel", {"run_id": run_id})
        assert shown(await take(viewer, 2)) == events_shown(2, 3, "completed")
        await nothing_waits(viewer)


async def test_a_run_that_is_reopened_goes_on_in_the_same_stream_and_ends_again(start: StartDaemon) -> None:
    daemon = start(grace_s=GRACE_S)
    async with peer(daemon) as viewer:
        async with peer(daemon) as agent:
            run_id = await recorded(agent, text(0), text(1))
            await subscribe(viewer, run_id)
        interrupted = await until_ended(viewer)
        assert shown(interrupted) == [STARTED, *events_shown(1, 2), ("ended", 2, "interrupted")]
        assert interrupted[-1]["status"] == "incomplete"
        async with peer(daemon) as owner:
            await owner.record(run_id, text(2), text(3))
            assert shown(await take(viewer, 2)) == events_shown(3, 4, "executing")
            await owner.record(run_id, END)
        assert shown(await until_ended(viewer)) == [("event", 5, "completed"), ("ended", 5, "completed")]
        await nothing_waits(viewer)


async def test_a_run_that_is_resumed_and_left_again_ends_a_second_time(start: StartDaemon) -> None:
    daemon = start(grace_s=GRACE_S)
    async with peer(daemon) as viewer:
        async with peer(daemon) as agent:
            run_id = await recorded(agent, text(0))
        await daemon.until("runs_interrupted", 1)
        await subscribe(viewer, run_id)
        assert shown(await until_ended(viewer)) == [STARTED, *events_shown(1, 1), ("ended", 1, "interrupted")]
        async with peer(daemon) as owner:
            assert (await owner.call("runs.resume", {"run_id": run_id}))["status"] == "executing"
            await nothing_waits(viewer)
        assert shown(await until_ended(viewer)) == [("ended", 1, "interrupted")]


async def test_who_goes_on_at_the_head_of_a_run_that_is_over_is_told_so_again(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent, text(0), END)
        epoch = (await agent.call("runs.get", {"run_id": run_id}))["epoch"]
        await subscribe(viewer, run_id, cursor=2, epoch=epoch)
        assert shown(await take(viewer, 1)) == [("ended", 2, "completed")]
        await nothing_waits(viewer)


# Leaving.


async def test_after_the_answer_to_an_unsubscribe_nothing_comes_though_the_stream_was_in_its_middle(
    start: StartDaemon,
) -> None:
    """The peer reads no more than it is asked to, and nothing vanishes in buffers: it is in the middle for certain."""
    daemon = start(send_buffer_bytes=SMALL)
    async with peer(daemon) as agent, raw_peer(daemon, receive_buffer=SMALL) as viewer:
        run_id = await recorded(agent)
        for at in range(0, 5_000, 1_000):
            await agent.record(run_id, *[text(n, 1_000) for n in range(at, at + 1_000)])
        viewer.send_call("start", "runs.trace.subscribe", {"run_id": run_id})
        assert (await viewer.message())["id"] == "start"
        assert (await viewer.message())["params"]["record"]["record"] == "started"
        cursors = [(await viewer.message())["params"]["cursor"] for _ in range(10)]
        viewer.send_call("stop", "runs.trace.unsubscribe", {"run_id": run_id})
        while "params" in (message := await viewer.message()):
            cursors.append(message["params"]["cursor"])
        assert message["result"] == {"run_id": run_id, "removed": True}
        assert cursors == list(range(1, 1 + len(cursors)))
        assert len(cursors) < 5_000, "it was in the middle"
        await agent.record(run_id, text(5_000), END)
        viewer.send_call("again", "runs.trace.unsubscribe", {"run_id": run_id})
        message = await viewer.message()
        assert (message["id"], message["result"]["removed"]) == ("again", False), "nothing came between"
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 0


async def test_a_viewer_that_goes_takes_its_subscriptions_along_and_never_touches_a_run(start: StartDaemon) -> None:
    daemon = start(grace_s=GRACE_S)
    async with peer(daemon) as agent:
        watched, other = await recorded(agent, text(0)), await recorded(agent)
        async with peer(daemon) as politely, peer(daemon) as abruptly:
            for viewer in (politely, abruptly):
                for run_id in (watched, other):
                    await subscribe(viewer, run_id)
            assert (await asyncio.to_thread(daemon.metrics))["subscriptions"] == 4
            abruptly.socket.transport.abort()
            await until_at_most(daemon, "subscriptions", 2)
        await until_at_most(daemon, "subscriptions", 0)
        # A run whose owner goes now is interrupted after the grace; the others have gone without a viewer for longer.
        async with peer(daemon) as leaving:
            await recorded(leaving)
        await daemon.until("runs_interrupted", 1)
        for run_id in (watched, other):
            assert (await agent.call("runs.get", {"run_id": run_id}))["status"] == "created"
        assert (await asyncio.to_thread(daemon.metrics))["runs_interrupted"] == 1


# Sizes.


async def test_an_event_larger_than_every_bound_reaches_a_live_viewer(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent)
        await subscribe(viewer, run_id)
        await take(viewer, 1)
        for n in range(3):
            largest = sized(n, 1024 * 1024)
            await agent.socket.send(
                '{"jsonrpc":"2.0","id":"big","method":"runs.record",'
                f'"params":{{"run_id":"{run_id}","events":[{largest}]}}}}'
            )
            _, answer = await until_answer(agent, "big")
            assert answer["result"]["cursor"] == n + 1
            (params,) = await take(viewer, 1)
            assert params["record"]["event"] == json.loads(largest)
        figures = await asyncio.to_thread(daemon.metrics)
        assert (figures["subscription_overflows"], figures["catch_up_pages"]) == (0, 0)


async def test_a_log_of_the_largest_events_can_be_caught_up_on(daemon: Daemon) -> None:
    async with peer(daemon) as agent, peer(daemon) as viewer:
        run_id = await recorded(agent)
        for n in range(4):
            await agent.record(run_id, json.loads(sized(n, 1024 * 1024 - 64)))
        await agent.record(run_id, END)
        await subscribe(viewer, run_id)
        assert [cursor for _, cursor, _ in shown(await until_ended(viewer))] == [0, 1, 2, 3, 4, 5, 5]
