"""How a run's status moves, who may move it and who is told: the tables of the contract, section 7, over the socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer

# How to make a live run have that status.
LIVE = {"created": [], "planning": ["planning_start"], "executing": ["step_start"], "verifying": ["verification_start"]}
FINAL: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "completed": ("runs.record", {"events": [{"type": "agent_end", "text": "first"}]}, {"result_text": "first"}),
    "failed": ("runs.fail", {"error": "first"}, {"error": "first"}),
    "cancelled": ("runs.cancel", {"reason": "first"}, {"cancel_reason": "first"}),
}
# The contract's table, with what its fields leave behind. "…" keeps planning, and is executing from elsewhere.
EFFECTS: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "agent_start": ({"prompt": "new"}, "executing", {}),
    "planning_start": ({}, "planning", {}),
    "step_start": ({}, "…", {}),
    "turn_start": ({}, "…", {}),
    "tool_start": ({}, "…", {}),
    "tool_execution_start": ({}, "…", {}),
    "verification_start": ({}, "verifying", {}),
    "agent_end": ({"text": "new"}, "completed", {"result_text": "new"}),
    "error": ({"message": "new"}, "failed", {"error": "new"}),
    "text_delta": ({}, "same", {}),
    "made.up": ({"status": "completed"}, "same", {}),
}
KEPT = ("result_text", "error", "cancel_reason", "interrupted_reason", "ended_at_ms")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("endings") / "state", grace_s=0.1) as daemon:
        yield daemon


@asynccontextmanager
async def interrupted(daemon: Daemon) -> AsyncIterator[tuple[Peer, dict[str, Any]]]:
    """A connection, and an interrupted run of its principal."""
    async with peer(daemon) as client:
        async with peer(daemon) as owner:
            run_id = (await owner.create("first"))["id"]
            await owner.record(run_id, {"type": "planning_start"})
        await client.call("runs.trace.subscribe", {"run_id": run_id})
        while (await client.next("runs.trace.event"))["run_status"] != "interrupted":
            pass
        await client.call("runs.trace.unsubscribe", {"run_id": run_id})
        yield client, await get(client, run_id)


async def live(client: Peer, status: str, **params: Any) -> str:
    """A new run of that status."""
    run_id: str = (await client.create("first", **params))["id"]
    for type_ in LIVE[status]:
        await client.record(run_id, {"type": type_})
    assert (await get(client, run_id))["status"] == status
    return run_id


async def final(client: Peer, status: str) -> str:
    """A new run that came to its end."""
    run_id: str = (await client.create("first"))["id"]
    method, params, _ = FINAL[status]
    await client.call(method, {"run_id": run_id, **params})
    return run_id


async def get(client: Peer, run_id: str) -> dict[str, Any]:
    """The snapshot of a run."""
    run: dict[str, Any] = await client.call("runs.get", {"run_id": run_id})
    return run


def kept(run: dict[str, Any]) -> dict[str, Any]:
    """What a run says of its end."""
    return {name: run[name] for name in KEPT if name in run}


# Events.


@pytest.mark.parametrize("type_", EFFECTS)
async def test_an_event_moves_a_live_run_as_the_table_says(type_: str, served: Daemon) -> None:
    fields, leads_to, leaves = EFFECTS[type_]
    async with peer(served) as client:
        for status in LIVE:
            run_id = await live(client, status)
            expected = {"…": "planning" if status == "planning" else "executing", "same": status}.get(
                leads_to, leads_to
            )
            answer = await client.record(run_id, {"type": type_, **fields})
            run = await get(client, run_id)
            assert (answer["status"], run["status"], run["prompt"]) == (expected, expected, "first")
            ended = {"ended_at_ms": run["updated_at_ms"]} if leaves else {}
            assert kept(run) == leaves | ended


@pytest.mark.parametrize("status", FINAL)
async def test_a_late_event_is_stored_and_moves_nothing(status: str, served: Daemon) -> None:
    async with peer(served) as client:
        run_id = await final(client, status)
        before = await get(client, run_id)
        assert kept(before) == FINAL[status][2] | {"ended_at_ms": before["updated_at_ms"]}
        for type_, (fields, _, _) in EFFECTS.items():
            answer = await client.record(run_id, {"type": type_, **fields})
            assert answer["status"] == status
        after = await get(client, run_id)
        assert (after["status"], kept(after), after["prompt"]) == (status, kept(before), "first")
        assert after["event_count"] == before["event_count"] + len(EFFECTS)
        page = await client.call("runs.events", {"run_id": run_id, "after": before["event_count"]})
        assert [entry["event"]["type"] for entry in page["events"]] == list(EFFECTS)


async def test_the_first_final_status_of_a_batch_wins(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        last_words = [{"type": "error", "message": "e"}, {"type": "agent_end", "text": "t"}]
        assert (await client.record(run_id, *last_words))["status"] == "failed"
        assert kept(await get(client, run_id)).keys() == {"error", "ended_at_ms"}
        run_id = (await client.create())["id"]
        assert (await client.record(run_id, *reversed(last_words)))["status"] == "completed"
        assert kept(await get(client, run_id)).keys() == {"result_text", "ended_at_ms"}


async def test_an_empty_prompt_is_filled_by_the_first_agent_start(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create(""))["id"]
        for prompt in ("", "one", "two"):
            await client.record(run_id, {"type": "agent_start", "prompt": prompt})
        assert (await get(client, run_id))["prompt"] == "one"


# Operations.


@pytest.mark.parametrize("status", LIVE)
async def test_a_live_run_is_failed_cancelled_and_attended(status: str, served: Daemon) -> None:
    async with peer(served) as client:
        failed = await client.call("runs.fail", {"run_id": await live(client, status), "error": "e"})
        assert (failed["status"], kept(failed)) == ("failed", {"error": "e", "ended_at_ms": failed["updated_at_ms"]})
        assert await get(client, failed["id"]) == failed
        run_id = await live(client, status)
        assert await client.call("runs.cancel", {"run_id": run_id}) == {"cancelled": True, "status": "cancelled"}
        run = await get(client, run_id)
        assert kept(run) == {"cancel_reason": "cancelled by host", "ended_at_ms": run["updated_at_ms"]}
        run_id = await live(client, status)
        before = await get(client, run_id)
        assert await client.call("runs.resume", {"run_id": run_id}) == before


@pytest.mark.parametrize("status", FINAL)
async def test_a_final_status_stays(status: str, served: Daemon) -> None:
    async with peer(served) as client:
        run_id = await final(client, status)
        before = await get(client, run_id)
        assert await client.call("runs.fail", {"run_id": run_id, "error": "second"}) == before
        answer = await client.call("runs.cancel", {"run_id": run_id, "reason": "second"})
        assert answer == {"cancelled": False, "status": status}
        with pytest.raises(Refused) as refused:
            await client.call("runs.resume", {"run_id": run_id})
        assert refused.value.data == {"type": "conflict", "reason": "run_terminal"}
        assert await get(client, run_id) == before


async def test_a_run_that_nobody_attends_is_interrupted_and_its_owner_goes_on_with_it(served: Daemon) -> None:
    async with interrupted(served) as (client, run):
        assert run["status"] == "interrupted"
        assert kept(run) == {"interrupted_reason": "owner gone", "ended_at_ms": run["updated_at_ms"]}
        answer = await client.record(run["id"], {"type": "text_delta"})
        assert answer["status"] == "executing"
        again = await get(client, run["id"])
        assert (again["status"], kept(again)) == ("executing", {})
        await client.record(run["id"], {"type": "agent_end", "text": "t"})
        assert (await get(client, run["id"]))["status"] == "completed"


async def test_an_interrupted_run_takes_the_events_of_one_batch_by_the_table(served: Daemon) -> None:
    async with interrupted(served) as (client, run):
        end = {"type": "agent_end", "text": "t"}
        assert (await client.record(run["id"], {"type": "tool_start"}, end))["status"] == "completed"
        after = await get(client, run["id"])
        assert kept(after) == {"result_text": "t", "ended_at_ms": after["updated_at_ms"]}


async def test_an_interrupted_run_is_failed_cancelled_or_resumed(served: Daemon) -> None:
    async with interrupted(served) as (client, run):
        failed = await client.call("runs.fail", {"run_id": run["id"], "error": "e"})
        assert (failed["status"], failed["error"]) == ("failed", "e")
    async with interrupted(served) as (client, run):
        answer = await client.call("runs.cancel", {"run_id": run["id"], "reason": "r"})
        assert answer == {"cancelled": True, "status": "cancelled"}
    async with interrupted(served) as (client, run):
        resumed = await client.call("runs.resume", {"run_id": run["id"]})
        assert (resumed["status"], kept(resumed)) == ("executing", {})
        # It is attended now: another one, made after it, is interrupted while it is not.
        async with interrupted(served):
            assert (await get(client, run["id"]))["status"] == "executing"


async def test_whoever_of_the_owners_connections_created_recorded_or_resumed_attends(served: Daemon) -> None:
    async with peer(served) as records, peer(served) as resumes, peer(served) as reads:
        async with peer(served) as creates:
            runs = [(await creates.create())["id"] for _ in range(3)]
            await records.record(runs[0], {"type": "x"})
            await resumes.call("runs.resume", {"run_id": runs[1]})
            await reads.call("runs.trace.subscribe", {"run_id": runs[2]})
            await reads.call("runs.events", {"run_id": runs[2]})
        while (await reads.next("runs.trace.event"))["run_status"] != "interrupted":
            pass  # watching is not attending
        assert [(await get(reads, run_id))["status"] for run_id in runs] == ["created", "created", "interrupted"]


# Who is told, and who may.


async def told(client: Peer) -> list[dict[str, Any]]:
    """What was pushed to a connection up to the answer of a ping."""
    await client.call("server.ping")
    frames = [json.loads(client.pushed.get_nowait()) for _ in range(client.pushed.qsize())]
    return [frame["params"] for frame in frames if frame["method"] == "runs.cancelled"]


async def test_a_cancel_is_told_once_to_every_connection_that_attends_and_to_nobody_else(served: Daemon) -> None:
    async with (
        peer(served) as creates,
        peer(served) as records,
        peer(served) as resumes,
        peer(served) as reads,
        peer(served, "host-token") as host,
    ):
        run_id = (await creates.create())["id"]
        await records.record(run_id, {"type": "x"})
        await resumes.call("runs.resume", {"run_id": run_id})
        await get(reads, run_id)
        await get(host, run_id)
        assert (await host.call("runs.cancel", {"run_id": run_id, "reason": "é\n"}))["cancelled"]
        for client in (creates, records, resumes):
            assert await told(client) == [{"run_id": run_id, "reason": "é\n"}]
        for client in (reads, host):
            assert await told(client) == []
        assert not (await host.call("runs.cancel", {"run_id": run_id}))["cancelled"]
        assert [await told(client) for client in (creates, records, resumes)] == [[], [], []]


async def test_who_cancels_its_own_run_is_told_before_it_is_answered(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        answer = client.start("runs.cancel", {"run_id": run_id})
        assert await client.next("runs.cancelled") == {"run_id": run_id, "reason": "cancelled by host"}
        assert (await answer)["cancelled"]


async def test_a_run_that_ends_otherwise_is_not_told_as_cancelled(served: Daemon) -> None:
    async with peer(served) as client, peer(served) as other:
        runs = [(await client.create())["id"] for _ in range(2)]
        await other.record(runs[0], {"type": "agent_end", "text": ""})
        await other.call("runs.fail", {"run_id": runs[1], "error": ""})
        assert await told(client) == []


@pytest.mark.parametrize(
    ("method", "params"),
    [("runs.record", {"events": [{"type": "x"}]}), ("runs.fail", {"error": "e"}), ("runs.resume", {})],
)
async def test_the_host_reads_and_cancels_anothers_run_but_does_not_write_into_it(
    method: str, params: dict[str, Any], served: Daemon
) -> None:
    token = agent_token(served.token("agent-key"), "somebody")
    async with peer(served, token) as owner, peer(served, "host-token") as host:
        run = await owner.create()
        with pytest.raises(Refused) as refused:
            await host.call(method, {"run_id": run["id"], **params})
        assert (refused.value.error["code"], refused.value.data) == (-32003, {"type": "forbidden"})
        assert await get(host, run["id"]) == run
        assert (await host.call("runs.events", {"run_id": run["id"]}))["events"] == []
        assert (await host.call("runs.cancel", {"run_id": run["id"]}))["cancelled"]
        assert (await get(owner, run["id"]))["status"] == "cancelled"


async def test_the_host_may_have_runs_of_its_own(served: Daemon) -> None:
    async with peer(served, "host-token") as host:
        run_id = (await host.create())["id"]
        assert (await host.record(run_id, {"type": "agent_end", "text": "t"}))["status"] == "completed"


async def test_of_two_that_end_a_run_at_once_one_wins_and_both_are_told_the_same(served: Daemon) -> None:
    async with peer(served) as one, peer(served) as other:
        for _ in range(20):
            run_id = (await one.create())["id"]
            cancelled, failed = await asyncio.gather(
                one.call("runs.cancel", {"run_id": run_id}), other.call("runs.fail", {"run_id": run_id, "error": "e"})
            )
            assert cancelled["status"] == failed["status"] == (await get(one, run_id))["status"]
            assert cancelled["cancelled"] is (failed["status"] == "cancelled")
