"""Runs of the real CAR client: written, followed and read by it, and by those who speak the native words."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from carserver.client.car import connect
from carserver.protocol.folder import agent_token
from tests.carclient import CarClient, CarError, car_client, needs_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host
from tests.peer import Peer, peer, records
from tests.trace import take
from tests.wire.test_command_line import carserver

pytestmark = needs_car

TURN: dict[str, Any] = {"prompt": "look", "tool": "grep", "parameters": {"pattern": "TODO"}, "output": {"found": 3}}
MODEL_TURN: dict[str, Any] = {
    "turn_index": 1,
    "assistant_text": "Ich schaue nach: grün?",
    "requested_tool_calls": [{"id": "c1", "name": "grep", "arguments": {"pattern": "TODO"}}],
    "model_id": "a-model",
    "token_usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    "duration_ms": 800,
}
OUTCOME: dict[str, Any] = {
    "status": "success",
    "summary": "nothing is left",
    "evidence": [{"kind": "tool_result", "description": "the search", "data": {"found": 0}}],
    "metrics": {"turns": 2, "tool_calls": 1, "duration_ms": 800},
    "timestamp": "2026-01-02T03:04:05Z",
}


async def started(car: CarClient, name: str = "probe", **params: Any) -> str:
    """A run of the agent `name:probe`."""
    answer = await car.call("runs_start", {"intent": "clean up", "agent_name": name, **params})
    assert answer["agent_id"] == f"name:{name}"
    run_id: str = answer["run_id"]
    return run_id


async def recorded(car: CarClient, run_id: str, *turns: Any) -> Any:
    """The answer to turns."""
    return await car.call("runs_record_turns", {"run_id": run_id, "turns": list(turns)})


def digest(data: bytes) -> str:
    """As anybody computes it."""
    return hashlib.sha256(data).hexdigest()


def member(frame: bytes, name: str) -> bytes:
    """The bytes of the object that is a member of a frame: up to the bracket that closes it."""
    start = frame.index(b'"%b":{' % name.encode()) + len(name) + 3
    _, length = json.JSONDecoder().raw_decode(frame[start:].decode())
    return frame[start:].decode()[:length].encode()


@asynccontextmanager
async def dialect(daemon: Daemon) -> AsyncIterator[Peer]:
    """A connection that speaks the dialect, and keeps the bytes of what comes."""
    async with peer(daemon) as connection:
        await connection.call("server.handshake", {"protocol_version": 3, "client_version": "0.58.0"})
        yield connection


async def frames_until_ended(viewer: Peer) -> list[bytes]:
    """The frames of a trace, as they came."""
    frames = [await viewer.next_frame()]
    while records(frames[-1:])[0]["record"]["record"] != "ended":
        frames.append(await viewer.next_frame())
    return frames


async def heard_until_ended(car: CarClient) -> list[dict[str, Any]]:
    """What the client's handler is told of a trace."""
    heard = [(await car.notified()).params]
    while heard[-1]["record"]["record"] != "ended":
        heard.append((await car.notified()).params)
    return heard


async def test_a_run_goes_from_start_to_its_outcome_and_no_further(served: Daemon) -> None:
    async with car_client(served) as car:
        run = await started(car, "all", outcome_description="all green")
        assert await recorded(car, run, TURN, {"output": "o"}) == {
            "run_id": run,
            "base_index": 0,
            "count": 2,
            "ok": True,
        }
        said = await car.call("runs_record_model_turn", {"run_id": run, **MODEL_TURN})
        assert said == {"run_id": run, "base_index": 2, "count": 1, "ok": True}
        assert await car.call("runs_complete", {"run_id": run, "outcome": OUTCOME}) == {"run_id": run, "ok": True}
        with pytest.raises(CarError, match=r"-32011 .*is completed already"):
            await car.call("runs_complete", {"run_id": run, "outcome": {"status": "failure", "summary": "no"}})
        dropped = {"base_index": 0, "count": 0, "ok": False}
        assert await recorded(car, run, TURN) == {"run_id": run, **dropped, "dropped": "run_terminal"}
        late = await car.call("runs_record_model_turn", {"run_id": run, **MODEL_TURN})
        assert late["dropped"] == "run_terminal"
        assert (await recorded(car, "run-nowhere", TURN))["dropped"] == "run_not_found"

        trace = await car.call("runs_get_trace", {"run_id": run})
        begun, *turns, ended = trace["records"]
        assert (begun["record"], begun["intent"], begun["outcome_description"]) == ("started", "clean up", "all green")
        assert turns[2].pop("recorded_at") >= begun["started_at"]
        assert turns == [
            {"record": "turn", "index": 0, **TURN, "verifier_verdict": "not_run"},
            {"record": "turn", "index": 1, "output": "o", "verifier_verdict": "not_run"},
            {"record": "model_turn", "index": 2, **MODEL_TURN},
        ]
        assert ended["termination"] == {"kind": "outcome", "outcome": OUTCOME}
        assert (ended["run_status"], ended["result_text"], trace["cursor"]) == ("completed", "nothing is left", 3)
        rest = await car.call("runs_get_trace", {"run_id": run, "cursor": 2})
        assert [record["record"] for record in rest["records"]] == ["model_turn", "ended"]
        assert (await car.call("runs_get_trace", {"run_id": run, "cursor": 3}))["records"] == [ended]
        unknown = await car.call("runs_get_trace", {"run_id": "run-nowhere"})
        assert unknown == {"run_id": "run-nowhere", "not_found": True}

        other = await started(car, "all")
        newest, oldest = (await car.call("runs_list", {"agent_id": "name:all"}))["runs"]
        assert (newest["run_id"], newest["status"], newest["turn_count"]) == (other, "in_progress", 0)
        assert "ended_at" not in newest
        assert oldest == {
            "run_id": run,
            "agent_id": "name:all",
            "intent": "clean up",
            "started_at": begun["started_at"],
            "ended_at": ended["ended_at"],
            "status": "completed",
            "turn_count": 3,
        }


async def test_a_run_is_its_agents_by_id_by_name_or_by_the_connection_and_never_nobodys(served: Daemon) -> None:
    token = agent_token(served.token("agent-key"), "miner")
    async with car_client(served) as car, car_client(served, token=token) as agent:
        answer = await car.call("runs_start", {"intent": "i", "agent_id": "digger", "agent_name": "Digger"})
        assert answer["agent_id"] == "digger"
        assert (await agent.call("runs_start", {"intent": "i", "agent_name": "Digger"}))["agent_id"] == "miner"
        with pytest.raises(CarError, match="-32602 agent_id: whose run is it"):
            await car.call("runs_start", {"intent": "i"})
        key = {"intent": "i", "agent_name": "a", "idempotency_key": "the run of the morning"}
        first = await car.call("runs_start", key)
        assert first["run_id"] == "the run of the morning"
        assert await car.call("runs_start", key) == first
        with pytest.raises(CarError, match="-32011"):
            await car.call("runs_start", key | {"intent": "another"})
        # Somebody else's run is none, but by its key.
        assert (await recorded(agent, first["run_id"], TURN))["dropped"] == "run_not_found"
        with pytest.raises(CarError, match="somebody else's"):
            await agent.call("runs_start", key)


async def test_both_vocabularies_make_one_stream_that_everyone_sees_alike(served: Daemon) -> None:
    async with (
        car_client(served) as writer,
        car_client(served) as viewer,
        dialect(served) as follower,
        peer(served) as native,
        peer(served) as watcher,
    ):
        run = await started(writer)
        await viewer.listen("runs.trace.event")
        followed = {"run_id": run, "agent_id": "name:probe", "turns_so_far": [], "cursor": 0, "status": "in_progress"}
        assert await viewer.call("runs_subscribe", {"run_id": run}) == followed
        assert await follower.call("runs.subscribe", {"run_id": run}) == followed
        await watcher.call("runs.trace.subscribe", {"run_id": run})

        async def turns() -> None:
            for number in range(30):
                await recorded(writer, run, {"output": f"→ {number}", "n": 1.5}, {"tool": "t"})
                await writer.call("runs_record_model_turn", {"run_id": run, **MODEL_TURN})

        async def events() -> None:
            for number in range(60):
                await native.record(run, {"type": "turn", "n": number}, {"type": "tool_start", "tool": "ü"})

        await asyncio.gather(turns(), events())
        await writer.call("runs_complete", {"run_id": run, "outcome": OUTCOME})
        frames, heard = await frames_until_ended(watcher), await heard_until_ended(viewer)
        assert await frames_until_ended(follower) == frames, "the very bytes"
        assert heard == records(frames)
        assert [params["cursor"] for params in heard] == [*range(211), 210]
        assert [params["record"].get("index", params["record"].get("sequence")) for params in heard[1:-1]] == [
            *range(210)
        ]
        kinds = [params["record"]["record"] for params in heard]
        assert (kinds[0], kinds.count("turn"), kinds.count("model_turn"), kinds.count("event"), kinds[-1]) == (
            "started",
            60,
            30,
            120,
            "ended",
        )
        trace = await viewer.call("runs_get_trace", {"run_id": run})
        assert trace["records"] == [params["record"] for params in heard]
        (listed,) = (await viewer.daemon_call("runs.list", {"agent_id": "name:probe"}))["runs"]
        assert listed["turn_count"] == 90


async def test_nothing_comes_of_a_run_that_was_unsubscribed_and_all_of_one_that_is_subscribed_again(
    served: Daemon,
) -> None:
    async with car_client(served) as writer, car_client(served) as viewer:
        run = await started(writer, "left")
        await recorded(writer, run, TURN)
        await viewer.listen("runs.trace.event")
        assert (await viewer.call("runs_subscribe", {"run_id": run}))["cursor"] == 1
        await recorded(writer, run, TURN)
        assert (await viewer.notified()).params["cursor"] == 2
        assert await viewer.call("runs_unsubscribe", {"run_id": run}) == {"run_id": run, "removed": True}
        assert await viewer.call("runs_unsubscribe", {"run_id": run}) == {"run_id": run, "removed": False}
        await recorded(writer, run, TURN)  # would be told before what follows
        again = await viewer.call("runs_subscribe", {"run_id": run})
        assert ([turn["index"] for turn in again["turns_so_far"]], again["cursor"]) == ([0, 1, 2], 3)
        await recorded(writer, run, TURN)
        assert (await viewer.notified()).params["cursor"] == 4
        with pytest.raises(CarError) as refused:
            await viewer.call("runs_subscribe", {"run_id": "run-nowhere"})
        assert (refused.value.type, refused.value.code) == ("DaemonRpcError", -32010)


async def test_what_the_client_writes_is_read_natively_and_what_is_written_natively_by_the_client(
    served: Daemon,
) -> None:
    async with car_client(served) as car, peer(served) as native, connect(state_dir=served.state) as ours:
        run = await started(car, "writer")
        await recorded(car, run, TURN)
        await car.call("runs_record_model_turn", {"run_id": run, **MODEL_TURN})
        outcome = {"status": "give_up", "summary": "no time", "of its own": [1]}
        await car.call("runs_complete", {"run_id": run, "outcome": outcome})
        snapshot = await native.call("runs.get", {"run_id": run})
        assert (snapshot["status"], snapshot["error"], snapshot["prompt"]) == ("failed", "no time", "clean up")
        page = await native.call("runs.events", {"run_id": run})
        assert [entry["event"]["type"] for entry in page["events"]] == ["turn", "model_turn"]
        assert page["events"][0]["event"] == {"type": "turn", "index": 0, **TURN, "verifier_verdict": "not_run"}
        async with aclosing(ours.runs.trace(run)) as trace:
            read = [traced async for traced in trace]
        assert [traced.record for traced in read] == (await car.call("runs_get_trace", {"run_id": run}))["records"]
        assert [traced.cursor for traced in read] == [0, 1, 2, 2]
        printed = await asyncio.to_thread(carserver, served, "runs", "trace", run)
        assert all(words in printed for words in ("grün?", 'grep  {"pattern":"TODO"}', "failed: no time", "give_up"))

        other = (await native.create(prompt="natively", agent_id="native"))["id"]
        await native.record(other, {"type": "agent_start", "prompt": "p"}, {"type": "agent_end", "text": "ready"})
        begun, first, second, ended = (await car.call("runs_get_trace", {"run_id": other}))["records"]
        assert (begun["intent"], begun["agent_id"]) == ("natively", "native")
        assert (first["event"], second["sequence"]) == ({"type": "agent_start", "prompt": "p"}, 1)
        assert (ended["run_status"], ended["result_text"]) == ("completed", "ready")
        await car.listen("runs.trace.event")
        followed = await car.call("runs_subscribe", {"run_id": other})
        assert (followed["turns_so_far"], followed["cursor"], followed["status"]) == ([first, second], 2, "completed")
        assert [params["record"] for params in await heard_until_ended(car)] == [ended]
        (listed,) = (await car.call("runs_list", {"agent_id": "native"}))["runs"]
        assert (listed["run_id"], listed["turn_count"], listed["status"]) == (other, 0, "completed")


async def test_a_receipt_can_be_checked_by_anybody_and_outlives_the_daemon(start: StartDaemon) -> None:
    daemon = start()
    async with car_client(daemon) as car, dialect(daemon) as watcher:
        run, other = await started(car), await started(car)
        await recorded(car, run, TURN)
        await watcher.call("runs.trace.subscribe", {"run_id": run})
        await car.listen("runs.cancelled")
        first = {"run_id": run, "idempotency_key": "schlüssel", "reason": 'genügt "völlig" \u2028 \x7f\x01 𝄞'}
        receipt = await car.call("runs_cancel", first)
        assert (await car.notified()).params == {"run_id": run, "reason": first["reason"]}
        ended = (await frames_until_ended(watcher))[-1]
        said = {name: receipt[name] for name in receipt if name != "receipt_digest"}
        assert said == {
            "receipt_version": 1,
            "run_id": run,
            "idempotency_key": "schlüssel",
            "reason_digest": digest(first["reason"].encode()),
            "principal": "client",
            "status": "cancelled_confirmed",
            "terminal_digest": digest(member(ended, "record")),
            "action_id": None,
            "request_id": None,
        }
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert receipt["receipt_digest"] == digest(canonical.encode())
        assert await car.call("runs_cancel", first) == receipt
        again = await car.call("runs_cancel", first | {"idempotency_key": "k2", "reason": "r"})
        assert (again["status"], again["terminal_digest"]) == ("already_terminal", receipt["terminal_digest"])
        for more in ({"run_id": other}, {"reason": "another"}):
            with pytest.raises(CarError) as refused:
                await car.call("runs_cancel", first | more)
            assert (refused.value.code, refused.value.data["reason"]) == (-32011, "key_reused")
    daemon.kill()
    await asyncio.to_thread(daemon.start)
    async with car_client(daemon) as car:
        assert await car.call("runs_cancel", first) == receipt
        resumed = await car.call("runs_resume", {"run_id": other})
        assert (resumed["run_id"], resumed["resumed_from_client_id"]) == (other, None)
        with pytest.raises(CarError, match="cannot be resumed"):
            await car.call("runs_resume", {"run_id": run})
        assert (await recorded(car, other, TURN))["ok"]


@pytest.mark.parametrize("answers", [True, False], ids=["the tool stops", "the tool goes on"])
async def test_a_cancel_tells_whether_the_tools_of_the_run_have_stopped(start: StartDaemon, answers: bool) -> None:
    daemon = start() if answers else start(kill_after_s=0.1, unconfirmed_s=0.1)
    async with car_client(daemon) as car, peer(daemon) as native:
        await car.call("register_tool", "dig")
        run = await started(car)
        action = {"id": "a1", "type": "tool_call", "tool": "dig", "parameters": {}, "dependencies": []}
        proposal = car.start("submit_proposal", {"actions": [action]})
        asked = await car.asked()
        assert (await native.call("runs.events", {"run_id": run}))["events"][0]["event"]["type"] == "tool_start"
        params = {"run_id": run, "idempotency_key": "k", "reason": "enough"}
        cancel = car.start("runs_cancel", params)
        assert await car.cancelled() == asked.call["request_id"]
        if answers:
            await asked.answers({"stopped": True})
        status = "cancelled_confirmed" if answers else "termination_unconfirmed"
        assert (await cancel)["status"] == status
        assert [result["status"] for result in (await proposal)["results"]] == ["cancelled"]
        if not answers:
            await asked.answers({"too": "late"})
        assert await car.call("runs_cancel", params) == await cancel
        assert (await native.call("runs.get", {"run_id": run}))["cancel_reason"] == "enough"


async def test_a_run_goes_on_with_who_resumes_it_and_with_no_one_else(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    async with (
        car_client(daemon) as old,
        car_client(daemon) as second,
        car_client(daemon) as third,
        peer(daemon) as native,
    ):
        lost, kept, only = [await started(old, name) for name in ("lost", "kept", "only")]
        taken = await second.call("runs_resume", {"run_id": lost})
        resumed = await third.call("runs_resume", {"run_id": kept})
        assert (resumed["run_id"], resumed["agent_id"]) == (kept, "name:kept")
        assert resumed["resumed_from_client_id"] == taken["resumed_from_client_id"] != resumed["client_id"]
        for run in (lost, kept, only):
            await native.call("runs.trace.subscribe", {"run_id": run})
        await take(native, 3)  # their `started`

        async def interrupted() -> str:
            (params,) = await take(native, 1)
            assert (params["record"]["record"], params["run_status"]) == ("ended", "interrupted")
            run_id: str = params["run_id"]
            return run_id

        await second.kill()
        assert await interrupted() == lost, "the old connection lives, and attends it no more"
        await old.kill()
        assert await interrupted() == only
        assert (await recorded(third, kept, TURN))["ok"]
        (params,) = await take(native, 1)
        assert (params["run_id"], params["record"]["record"]) == (kept, "turn"), "it was not interrupted"
        again = await third.call("runs_resume", {"run_id": lost})
        assert (again["client_id"], again["resumed_from_client_id"]) == (resumed["client_id"], taken["client_id"])
        assert (await recorded(third, lost, TURN))["base_index"] == 0
        await third.call("runs_complete", {"run_id": lost, "outcome": OUTCOME})
        assert (await native.call("runs.get", {"run_id": lost}))["result_text"] == OUTCOME["summary"]


async def test_a_tool_of_another_host_is_stopped_before_the_client_has_its_receipt(served: Daemon) -> None:
    async with car_client(served) as car, peer(served) as worker, peer(served) as caller:
        host = Host(worker)
        await host.register("mine")
        run = await started(car, "caller")
        await caller.call("tools.invoke", {"tool": "mine", "run_id": run})
        asked = await host.asked()
        cancel = car.start("runs_cancel", {"run_id": run, "idempotency_key": "of another", "reason": "r"})
        await host.told_to_stop()
        assert not cancel.done()
        await asked.fail("stopped")
        assert (await cancel)["status"] == "cancelled_confirmed"
