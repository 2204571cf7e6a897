"""`runs.delete`: who may, what goes along, and what viewers and readers of the run see."""

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import connect

from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import ANSWER_S, Peer, Refused, peer
from tests.trace import until_at_most

END = {"type": "agent_end", "text": "done"}


async def over(client: Peer, *events: Any, **params: Any) -> str:
    """A new run that is completed, with these events before its end."""
    run_id: str = (await client.create(**params))["id"]
    await client.record(run_id, *events, END)
    return run_id


async def closed(viewer: Peer, run_id: str) -> None:
    """The viewer is told that this run is no more, and nothing of it after that."""
    assert await viewer.next("runs.trace.closed") == {"run_id": run_id, "reason": "the run was deleted"}
    await viewer.call("server.ping")
    assert viewer.pushed.empty()


async def refusal(client: Peer, run_id: str, method: str = "runs.delete", **params: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        await client.call(method, {"run_id": run_id, **params})
    return refused.value


async def test_a_deleted_run_is_not_there_for_anyone_nor_are_its_outputs(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        run_id, other = await over(client), await over(client)
        ref = {"task_id": "t", "attempt": 0, "producer_agent": "p", "event": {"type": "progress", "stage": "s"}}
        gone = await client.call("outputs.append", {**ref, "run_id": run_id})
        stays = [await client.call("outputs.append", {**ref, **more}) for more in ({"run_id": other}, {})]
        assert await client.call("runs.delete", {"run_id": run_id}) == {"deleted": True}
        for method, params in (
            ("runs.get", {}),
            ("runs.events", {}),
            ("runs.delete", {}),
            ("runs.record", {"events": [END]}),
            ("runs.resume", {}),
            ("runs.trace.subscribe", {}),
        ):
            for who in (client, host):
                assert (await refusal(who, run_id, method, **params)).type == "not_found"
        assert [run["id"] for run in (await host.call("runs.list"))["runs"]] == [other]
        listed = await client.call("outputs.list", {"task_id": "t", "attempt": 0})
        assert [output["id"] for output in listed["outputs"]] == [output["id"] for output in stays]
        with pytest.raises(Refused, match="unknown output"):
            await client.call("outputs.get", gone)


async def test_only_its_owner_deletes_a_run_and_only_when_it_is_over(daemon: Daemon) -> None:
    token = agent_token(daemon.token("agent-key"), "a")
    async with peer(daemon) as client, peer(daemon, "host-token") as host, peer(daemon, token) as agent:
        run_id = await over(agent)
        assert (await refusal(host, run_id)).type == "forbidden"
        unseen, unknown = await refusal(client, run_id), await refusal(client, "run-x")
        assert unseen.error["data"] == unknown.error["data"]
        live = (await agent.create())["id"]
        assert (await refusal(agent, live)).data == {"type": "conflict", "reason": "run_live"}
        assert await agent.call("runs.delete", {"run_id": run_id}) == {"deleted": True}
        await agent.call("runs.cancel", {"run_id": live})
        assert await agent.call("runs.delete", {"run_id": live}) == {"deleted": True}


async def test_an_interrupted_run_is_over(start: StartDaemon) -> None:
    daemon = start(grace_s=0.05)
    async with peer(daemon) as client:
        async with peer(daemon) as owner:
            run_id = (await owner.create())["id"]
        await daemon.until("runs_interrupted", 1)
        assert await client.call("runs.delete", {"run_id": run_id}) == {"deleted": True}


# Viewers.


async def test_every_live_viewer_is_told_and_the_owner_is_answered(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as one, peer(daemon, "host-token") as other:
        run_id = await over(owner)
        for viewer in (one, other):
            await viewer.call("runs.trace.subscribe", {"run_id": run_id})
            while (await viewer.next("runs.trace.event"))["record"]["record"] != "ended":
                pass
        await owner.call("runs.delete", {"run_id": run_id})
        for viewer in (one, other):
            await closed(viewer, run_id)
            assert await viewer.call("runs.trace.unsubscribe", {"run_id": run_id}) == {
                "run_id": run_id,
                "removed": False,
            }
        assert daemon.metrics()["subscriptions"] == 0


async def test_a_viewer_that_is_catching_up_gets_a_beginning_of_the_log_and_is_told(daemon: Daemon) -> None:
    headers = {"Authorization": f"Bearer {daemon.token()}"}
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        for _ in range(40):
            await owner.record(run_id, *({"type": "text", "text": "x" * 100_000} for _ in range(10)))
        await owner.record(run_id, END)
        # It does not read: what is on its way fills, and the rest of 40 MB waits in the log.
        async with connect(daemon.url, additional_headers=headers, max_size=None, max_queue=1) as viewer:
            subscribe = {"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": {"run_id": run_id}}
            await viewer.send(json.dumps(subscribe))
            await daemon.until("catch_up_pages", 1)
            await owner.call("runs.delete", {"run_id": run_id})
            sequences = []
            while (message := json.loads(await asyncio.wait_for(viewer.recv(), ANSWER_S))).get("method") != (
                "runs.trace.closed"
            ):
                record = message.get("params", {}).get("record", {})
                if "sequence" in record:
                    sequences.append(record["sequence"])
            assert message["params"] == {"run_id": run_id, "reason": "the run was deleted"}
            assert sequences == list(range(len(sequences)))
            assert len(sequences) < 401


async def test_a_viewer_whose_subscription_waits_in_a_batch_is_told_after_its_reply(daemon: Daemon) -> None:
    async with peer(daemon) as client:
        run_id = await over(client)
        calls = [
            {"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": {"run_id": run_id}},
            {"jsonrpc": "2.0", "id": 2, "method": "runs.delete", "params": {"run_id": run_id}},
        ]
        replies = await client.raw(json.dumps(calls))
        assert {reply["id"]: "result" in reply for reply in replies} == {1: True, 2: True}
        await closed(client, run_id)


async def test_a_run_made_anew_with_the_same_key_is_another_log_for_who_comes_back(daemon: Daemon) -> None:
    async with peer(daemon) as client:
        run_id = await over(client, {"type": "a"}, idempotency_key="k")
        before = await client.call("runs.trace.subscribe", {"run_id": run_id})
        await client.call("runs.delete", {"run_id": run_id})
        await client.next("runs.trace.closed")
        again = await client.create(prompt="another", idempotency_key="k")
        assert (again["id"], again["event_count"], again["status"]) == (run_id, 0, "created")
        await client.record(run_id, *({"type": "b"} for _ in range(5)))
        resumed = await client.call("runs.trace.subscribe", {"run_id": run_id, "cursor": 1, "epoch": before["epoch"]})
        assert resumed["epoch"] == again["epoch"] != before["epoch"]
        assert (resumed["recovered"], resumed["cursor"]) == (False, 0)
        types: list[str] = []
        while len(types) < 5:
            record = (await client.next("runs.trace.event"))["record"]
            if record["record"] == "event":
                types.append(record["event"]["type"])
        assert types == ["b"] * 5


# Readers, and the sweep.


async def test_who_reads_while_the_run_goes_gets_whole_pages_or_not_found(daemon: Daemon) -> None:
    async with peer(daemon) as owner, peer(daemon) as reader:
        run_id = (await owner.create())["id"]
        for _ in range(20):
            await owner.record(run_id, *({"type": "text", "text": "x" * 2_000} for _ in range(500)))
        await owner.record(run_id, END)

        async def read() -> int:
            pages = 0
            while True:
                try:
                    page = await reader.call("runs.events", {"run_id": run_id, "after": pages * 500 % 10_000})
                except Refused as refused:
                    assert refused.type == "not_found"  # noqa: PT017 - what else it is, is told by the loop's answers
                    return pages
                assert len(page["events"]) == page["cursor"] - pages * 500 % 10_000
                pages += 1

        reading = [asyncio.create_task(read()) for _ in range(4)]
        await asyncio.sleep(0)
        await owner.call("server.ping")
        await owner.call("runs.delete", {"run_id": run_id})
        await asyncio.gather(*reading)
        assert daemon.metrics()["errors"] == 4


async def test_a_kill_in_the_middle_of_the_sweep_leaves_nothing_but_what_the_next_daemon_removes(
    start: StartDaemon,
) -> None:
    daemon = start(sweep_events=200, sweep_pause_s=0.02)
    async with peer(daemon) as client:
        stays = await over(client, {"type": "a"})
        run_id = (await client.create())["id"]
        for _ in range(20):
            await client.record(run_id, *({"type": "text", "text": "x" * 500} for _ in range(500)))
        await client.record(run_id, END)
        await client.call("runs.delete", {"run_id": run_id})
        acknowledged = 0
        while daemon.metrics()["storage_sweep_waiting"]:
            await client.record(stays, {"type": "late"})
            acknowledged += 1
            if acknowledged == 5:
                break
    daemon.kill()
    daemon.start()
    async with peer(daemon, "host-token") as host:
        assert [run["id"] for run in (await host.call("runs.list"))["runs"]] == [stays]
        assert (await host.call("runs.get", {"run_id": stays}))["event_count"] == 2 + acknowledged
        await until_at_most(daemon, "storage_sweep_waiting", 0)
        # 5 MB of events are given back: by the checkpoint that follows, and that no reader then meets.
        await until_at_most(daemon, "storage_database_bytes", 1_000_000)
        page = await host.call("runs.events", {"run_id": stays})
        assert [entry["sequence"] for entry in page["events"]] == list(range(2 + acknowledged))


@pytest.mark.parametrize("pruned", [False, True], ids=["deleted", "pruned"])
async def test_the_outputs_of_a_run_go_a_piece_at_a_time_and_all_of_them_do(start: StartDaemon, pruned: bool) -> None:
    daemon = start(prune_outputs=10)
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        runs = [await client.create(), await client.create()]
        event = {"type": "progress", "stage": "s"}
        ref = {"task_id": "t", "attempt": 0, "producer_agent": "a", "event": event, "run_id": runs[0]["id"]}
        await asyncio.gather(*[client.start("outputs.append", ref) for _ in range(35)])
        for run in runs:
            await client.call("runs.cancel", {"run_id": run["id"]})
        before = daemon.metrics()["commits"]
        if pruned:
            answer = await host.call("server.prune", {"max_runs": 0})
            assert (answer["runs"], answer["outputs"]) == (2, 35)
        else:
            assert await client.call("runs.delete", {"run_id": runs[0]["id"]}) == {"deleted": True}
        assert daemon.metrics()["commits"] - before >= 4, "ten outputs in each, and the run in the last"
        assert (await client.call("outputs.list", {"task_id": "t", "attempt": 0}))["outputs"] == []
        left = {run["id"] for run in (await host.call("runs.list"))["runs"]}
        assert left == set() if pruned else {runs[1]["id"]}
