"""Runs in the words of the CAR dialect, by raw frames: written, read, followed, cancelled with a receipt."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from carserver.protocol.folder import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host
from tests.peer import Peer, Refused, peer, records

OUTCOME = {"status": "success", "summary": "done it", "evidence": [{"kind": "k", "data": {"x": 1.50}}], "metrics": {}}
TURN = {"prompt": "p", "tool": "echo", "parameters": {"a": 1}, "output": "o"}


@contextlib.asynccontextmanager
async def car(daemon: Daemon, token: str | None = "auth-token") -> AsyncIterator[Peer]:
    """A connection that speaks the dialect."""
    async with peer(daemon, token) as connection:
        await connection.call("server.handshake", {"protocol_version": 3, "client_version": "0.58.0"})
        yield connection


async def started(connection: Peer, key: str | None = None, **params: Any) -> str:
    """A run of the agent `name:probe`."""
    given = {"intent": "probe", "agent_name": "probe", **params} | ({"idempotency_key": key} if key else {})
    answer = await connection.call("runs.start", given)
    run_id: str = answer["run_id"]
    return run_id


def digest(data: str) -> str:
    """Of a text's UTF-8."""
    return hashlib.sha256(data.encode()).hexdigest()


def canonical(value: Any) -> str:
    """RFC 8785, for values without fractions."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


async def until_ended(connection: Peer) -> list[dict[str, Any]]:
    """The params of `runs.trace.event` up to the record `ended`."""
    frames: list[bytes] = []
    while not frames or json.loads(frames[-1])["params"]["record"]["record"] != "ended":
        frames.append(await connection.next_frame())
    return records(frames)


async def test_a_run_goes_from_start_to_its_outcome_in_the_dialects_words(daemon: Daemon) -> None:
    async with car(daemon) as agent:
        run = await started(agent, outcome_description="all green")
        assert run.startswith("run-")
        recorded = await agent.call("runs.record_turns", {"run_id": run, "turns": [TURN, {"output": {"k": 1}}]})
        assert recorded == {"run_id": run, "base_index": 0, "count": 2, "ok": True}
        model = {"turn_index": 1, "assistant_text": "hi", "requested_tool_calls": [], "model_id": "m"}
        more = {"token_usage": None, "duration_ms": 3}
        recorded = await agent.call("runs.record_model_turn", {"run_id": run, **model, **more})
        assert recorded == {"run_id": run, "base_index": 2, "count": 1, "ok": True}
        assert await agent.call("runs.complete", {"run_id": run, "outcome": OUTCOME}) == {"run_id": run, "ok": True}
        with pytest.raises(Refused, match="is completed already"):
            await agent.call("runs.complete", {"run_id": run, "outcome": {"status": "success"}})
        late = await agent.call("runs.record_turns", {"run_id": run, "turns": [TURN]})
        assert late == {"run_id": run, "base_index": 0, "count": 0, "ok": False, "dropped": "run_terminal"}
        trace = await agent.call("runs.get_trace", {"run_id": run})
        begun, first, second, third, ended = trace["records"]
        assert begun["record"] == "started"
        assert (begun["intent"], begun["agent_id"], begun["outcome_description"]) == (
            "probe",
            "name:probe",
            "all green",
        )
        assert first == {"record": "turn", "index": 0, **TURN, "verifier_verdict": "not_run"}
        assert second == {"record": "turn", "index": 1, "output": {"k": 1}, "verifier_verdict": "not_run"}
        assert third.pop("recorded_at").endswith("Z")
        assert third == {"record": "model_turn", "index": 2, **model, **more}
        assert ended["termination"] == {"kind": "outcome", "outcome": OUTCOME}
        assert (ended["run_status"], ended["result_text"], trace["cursor"]) == ("completed", "done it", 3)
        (listed,) = (await agent.call("runs.list", {"agent_id": "name:probe"}))["runs"]
        assert (listed["status"], listed["turn_count"], listed["intent"]) == ("completed", 3, "probe")
        assert listed["started_at"] <= listed["ended_at"]


@pytest.mark.parametrize(
    ("status", "run_status"),
    [
        ("success", "completed"),
        ("partial_success", "completed"),
        ("done", "completed"),
        ("give_up", "failed"),
        ("timeout", "failed"),
        ("failure", "failed"),
    ],
)
async def test_an_outcome_completes_a_run_or_fails_it(served: Daemon, status: str, run_status: str) -> None:
    async with car(served) as agent:
        run = await started(agent)
        await agent.call("runs.complete", {"run_id": run, "outcome": {"status": status, "summary": "s"}})
        snapshot = await agent.call("runs.get", {"run_id": run})
        assert snapshot["status"] == run_status
        assert snapshot["result_text" if run_status == "completed" else "error"] == "s"


async def test_what_is_wrong_with_params_is_named(served: Daemon) -> None:
    async with car(served) as agent:
        run = await started(agent)
        for method, params, path in [
            ("runs.start", {"intent": "i"}, "agent_id"),
            ("runs.start", {"intent": "i", "agent_name": "a", "idempotency_key": "run-1"}, "idempotency_key"),
            ("runs.complete", {"run_id": run, "outcome": {"status": "great"}}, "outcome.status"),
            ("runs.complete", {"run_id": run, "outcome": {}}, "outcome"),
            ("runs.record_turns", {"run_id": run, "turns": []}, "turns"),
            ("runs.record_turns", {"run_id": run, "turns": [TURN, 1]}, "turns[1]"),
            ("runs.get_trace", {"run_id": run, "cursor": 1}, "cursor"),
        ]:
            with pytest.raises(Refused) as refused:
                await agent.call(method, params)
            assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", path)


async def test_turns_are_dropped_with_the_right_word_and_all_or_none_of_a_batch(start: StartDaemon) -> None:
    daemon = start(turns=3)
    async with car(daemon) as agent, car(daemon, "host-token") as host:
        run = await started(agent)

        async def record(connection: Peer, run_id: str, *turns: Any) -> Any:
            return await connection.call("runs.record_turns", {"run_id": run_id, "turns": list(turns)})

        assert (await record(agent, "nope", TURN))["dropped"] == "run_not_found"
        assert (await record(host, run, TURN))["dropped"] == "run_not_found"  # it is not the owner
        assert (await record(agent, run, TURN, TURN))["ok"]
        assert (await record(agent, run, TURN, TURN))["dropped"] == "run_turn_limit"
        assert (await record(agent, run, {f"m{number}": 0 for number in range(40_000)}))["dropped"] == "turn_too_large"
        assert await record(agent, run, TURN) == {"run_id": run, "base_index": 2, "count": 1, "ok": True}
        assert (await record(agent, run, TURN))["dropped"] == "run_turn_limit"
        with pytest.raises(Refused) as refused:
            await record(agent, run, *[TURN] * 257)
        assert (refused.value.data["limit"], refused.value.data["maximum"]) == ("record_turns", 256)
        assert len((await agent.call("runs.get_trace", {"run_id": run}))["records"]) == 4


async def test_a_key_is_the_runs_id_and_a_name_among_all(served: Daemon) -> None:
    async with car(served) as agent, car(served, "host-token") as host:
        run = await started(agent, "a key of mine")
        assert run == "a key of mine"
        assert await started(agent, run) == run
        with pytest.raises(Refused) as refused:
            await started(agent, run, intent="another")
        assert refused.value.data["reason"] == "key_reused"
        with pytest.raises(Refused) as refused:
            await started(host, run)
        assert refused.value.data["reason"] == "exists"
        assert (await host.call("runs.get_trace", {"run_id": run}))["run_id"] == run


async def test_a_run_is_followed_from_its_beginning_with_no_gap_and_no_repeat(daemon: Daemon) -> None:
    async with car(daemon) as agent, car(daemon) as viewer:
        run = await started(agent)
        await agent.call("runs.record_turns", {"run_id": run, "turns": [{"output": n} for n in range(100)]})
        followed = await viewer.call("runs.subscribe", {"run_id": run})
        assert [turn["output"] for turn in followed["turns_so_far"]] == list(range(100))
        assert (followed["cursor"], followed["status"], followed["agent_id"]) == (100, "in_progress", "name:probe")
        await agent.call("runs.record_turns", {"run_id": run, "turns": [{"output": n} for n in range(100, 150)]})
        await agent.call("runs.complete", {"run_id": run, "outcome": OUTCOME})
        *turns, ended = await until_ended(viewer)
        assert [(notice["cursor"], notice["record"]["output"]) for notice in turns] == [
            (number + 1, number) for number in range(100, 150)
        ]
        assert (ended["status"], ended["record"]["termination"]["outcome"]) == ("completed", OUTCOME)
        assert await viewer.call("runs.unsubscribe", {"run_id": run}) == {"run_id": run, "removed": True}
        assert await viewer.call("runs.unsubscribe", {"run_id": run}) == {"run_id": run, "removed": False}


async def test_what_does_not_fit_in_the_answer_of_a_subscription_is_streamed(start: StartDaemon) -> None:
    daemon = start(so_far_turns=10)
    async with car(daemon) as agent, car(daemon) as viewer:
        run = await started(agent)
        await agent.call("runs.record_turns", {"run_id": run, "turns": [{"output": n} for n in range(25)]})
        await agent.call("runs.complete", {"run_id": run, "outcome": OUTCOME})
        followed = await viewer.call("runs.subscribe", {"run_id": run})
        assert (len(followed["turns_so_far"]), followed["cursor"]) == (10, 10)
        streamed = await until_ended(viewer)
        assert [notice["cursor"] for notice in streamed] == [*range(11, 26), 25]


async def test_a_long_trace_is_read_in_parts_that_say_that_there_is_more(start: StartDaemon) -> None:
    daemon = start(whole_trace_bytes=2_000)
    async with car(daemon) as agent:
        run = await started(agent)
        for _ in range(20):
            await agent.call("runs.record_turns", {"run_id": run, "turns": [{"output": "x" * 500}]})
        await agent.call("runs.complete", {"run_id": run, "outcome": OUTCOME})
        read: list[dict[str, Any]] = []
        more, cursor = True, 0
        while more:
            page = await agent.call("runs.get_trace", {"run_id": run, "cursor": cursor})
            read += page["records"]
            more, cursor = page.get("has_more", False), page["cursor"]
        assert [record["record"] for record in read] == ["started", *["turn"] * 20, "ended"]
        assert [record["index"] for record in read[1:-1]] == list(range(20))


async def test_a_trace_of_many_small_events_counts_what_its_records_take(start: StartDaemon) -> None:
    daemon = start(whole_trace_bytes=20_000, frame_bytes=65_536)
    async with peer(daemon) as native, car(daemon) as client:
        run = (await native.create())["id"]
        await native.record(run, *[{"type": "x"}] * 1_000)
        page = await client.call("runs.get_trace", {"run_id": run})
        assert page["has_more"]
        assert 100 < page["cursor"] < 400
        assert page["cursor"] == len(page["records"]) - 1


async def test_a_run_written_natively_is_read_in_the_dialect_and_the_other_way_round(daemon: Daemon) -> None:
    async with peer(daemon) as native, car(daemon) as client:
        run = await native.create(prompt="natively", agent_id="writer")
        await native.record(run["id"], {"type": "turn", "output": 1}, {"type": "agent_end", "text": "ready"})
        trace = await client.call("runs.get_trace", {"run_id": run["id"]})
        assert [record["record"] for record in trace["records"]] == ["started", "event", "event", "ended"]
        assert trace["records"][1]["event"] == {"type": "turn", "output": 1}
        (listed,) = (await client.call("runs.list", {"agent_id": "writer"}))["runs"]
        assert (listed["run_id"], listed["status"], listed["turn_count"]) == (run["id"], "completed", 0)

        other = await started(client)
        await client.call("runs.record_turns", {"run_id": other, "turns": [TURN]})
        await native.record(other, {"type": "text_delta", "text": "t"})
        await client.call("runs.complete", {"run_id": other, "outcome": OUTCOME})
        page = await native.call("runs.events", {"run_id": other})
        events = [entry["event"] for entry in page["events"]]
        assert events == [
            {"type": "turn", "index": 0, **TURN, "verifier_verdict": "not_run"},
            {"type": "text_delta", "text": "t"},
        ]
        await native.call("runs.trace.subscribe", {"run_id": other})
        streamed = await until_ended(native)
        assert [notice["record"]["record"] for notice in streamed] == ["started", "turn", "event", "ended"]
        assert [notice["cursor"] for notice in streamed] == [0, 1, 2, 2]
        followed = await client.call("runs.get_trace", {"run_id": other})
        assert followed["records"] == [notice["record"] for notice in streamed]


async def test_a_cancel_answers_with_a_receipt_whose_digests_can_be_checked(daemon: Daemon) -> None:
    async with car(daemon) as agent, car(daemon, "host-token") as host:
        run = await started(agent, "grün")
        await agent.call("runs.subscribe", {"run_id": run})
        receipt = await host.call("runs.cancel", {"run_id": run, "idempotency_key": "kéy", "reason": "genügt"})
        assert await agent.next("runs.cancelled") == {"run_id": run, "reason": "genügt"}
        said = {name: value for name, value in receipt.items() if name != "receipt_digest"}
        assert receipt["receipt_digest"] == digest(canonical(said))
        assert receipt["reason_digest"] == digest("genügt")
        assert (receipt["status"], receipt["principal"]) == ("cancelled_confirmed", "host")
        assert (receipt["action_id"], receipt["request_id"], receipt["receipt_version"]) == (None, None, 1)
        ended = (await agent.call("runs.get_trace", {"run_id": run}))["records"][-1]
        assert ended["run_status"] == "cancelled"
        assert receipt["terminal_digest"] == digest(json.dumps(ended, separators=(",", ":"), ensure_ascii=False))


async def test_the_same_key_gives_the_same_receipt_and_no_other_cancel(start: StartDaemon) -> None:
    daemon = start()
    first = {"run_id": "one", "idempotency_key": "k", "reason": "r"}
    async with car(daemon) as agent:
        await started(agent, "one")
        await started(agent, "two")
        receipt = await agent.call("runs.cancel", first)
        assert await agent.call("runs.cancel", first) == receipt
        for other in ({"run_id": "two"}, {"reason": "another"}):
            with pytest.raises(Refused) as refused:
                await agent.call("runs.cancel", first | other)
            assert refused.value.data["reason"] == "key_reused"
        again = await agent.call("runs.cancel", first | {"idempotency_key": "k2"})
        assert again["status"] == "already_terminal"
        assert again["terminal_digest"] == receipt["terminal_digest"]
        with pytest.raises(Refused) as refused:
            await agent.call("runs.cancel", {"run_id": "nope", "idempotency_key": "k3", "reason": "r"})
        assert refused.value.type == "not_found"
    daemon.kill()
    daemon.start()
    async with car(daemon) as agent, car(daemon, "host-token") as host:
        assert await agent.call("runs.cancel", first) == receipt
        assert (await host.call("runs.cancel", first))["principal"] == "host"  # a key is its principal's


async def test_a_daemon_that_dies_before_the_proof_leaves_a_receipt_that_claims_none(start: StartDaemon) -> None:
    daemon = start()
    first = {"run_id": "one", "idempotency_key": "k", "reason": "r"}
    async with car(daemon) as agent, peer(daemon) as worker, peer(daemon) as caller:
        host = Host(worker)
        await host.register("dig")
        await started(agent, "one")
        await caller.call("tools.invoke", {"tool": "dig", "run_id": "one"})
        await host.asked()
        cancel = agent.start("runs.cancel", first)
        await host.told_to_stop()  # so the cancel is durable, and its proof is waited for
        daemon.kill()
        with pytest.raises(ConnectionError):
            await cancel
    daemon.start()
    async with car(daemon) as agent:
        receipt = await agent.call("runs.cancel", first)
        assert receipt["status"] == "termination_unconfirmed"
        assert await agent.call("runs.cancel", first) == receipt


@pytest.mark.parametrize(("answers", "status"), [(True, "cancelled_confirmed"), (False, "termination_unconfirmed")])
async def test_a_cancel_waits_until_what_ran_is_gone_or_was_given_up(
    start: StartDaemon, answers: bool, status: str
) -> None:
    daemon = start() if answers else start(kill_after_s=0.3, unconfirmed_s=0.2)
    async with car(daemon) as agent, peer(daemon) as worker, peer(daemon) as caller:
        host = Host(worker)
        await host.register("dig")
        run = await started(agent)
        await caller.call("tools.invoke", {"tool": "dig", "run_id": run})
        asked = await host.asked()
        cancel = agent.start("runs.cancel", {"run_id": run, "idempotency_key": "k", "reason": "r"})
        await worker.next("tools.cancel")
        second = agent.start("runs.cancel", {"run_id": run, "idempotency_key": "k", "reason": "r"})
        if answers:
            await asked.fail("stopped")
        assert (await cancel)["status"] == status
        assert await second == await cancel


async def test_a_cancel_waits_for_a_tool_that_was_stopped_before(daemon: Daemon) -> None:
    async with car(daemon) as agent, peer(daemon) as worker, peer(daemon) as caller:
        host = Host(worker)
        await host.register("dig")
        run = await started(agent)
        handle = (await caller.call("tools.invoke", {"tool": "dig", "run_id": run}))["handle"]
        asked = await host.asked()
        assert (await caller.call("tools.cancel", {"handle": handle}))["cancel"] == "requested"
        cancel = agent.start("runs.cancel", {"run_id": run, "idempotency_key": "k", "reason": "r"})
        await agent.next("runs.cancelled")
        for _ in range(5):
            await agent.call("server.ping")
        assert not cancel.done()
        await asked.fail("stopped")
        assert (await cancel)["status"] == "cancelled_confirmed"


async def test_a_cancel_knows_of_a_tool_that_is_known_not_to_have_stopped(start: StartDaemon) -> None:
    daemon = start(kill_after_s=0.2, unconfirmed_s=0.1)
    async with car(daemon) as agent, peer(daemon) as worker, peer(daemon) as caller:
        host = Host(worker)
        await host.register("dig")
        run = await started(agent)
        handle = (await caller.call("tools.invoke", {"tool": "dig", "run_id": run}))["handle"]
        await host.asked()
        assert (await caller.call("tools.cancel", {"handle": handle, "wait_ms": 20_000}))["cancel"] == "unconfirmed"
        receipt = await agent.call("runs.cancel", {"run_id": run, "idempotency_key": "k", "reason": "r"})
        assert receipt["status"] == "termination_unconfirmed"


async def test_a_cancel_knows_of_a_tool_whose_host_was_lost(daemon: Daemon) -> None:
    async with car(daemon) as agent, peer(daemon) as caller:
        run = await started(agent)
        async with peer(daemon) as worker:
            host = Host(worker)
            await host.register("dig")
            handle = (await caller.call("tools.invoke", {"tool": "dig", "run_id": run}))["handle"]
            await host.asked()
        poll = await caller.call("tools.poll", {"handle": handle, "wait_ms": 20_000, "after": 0})
        assert poll["status"] == "failed"
        receipt = await agent.call("runs.cancel", {"run_id": run, "idempotency_key": "k", "reason": "r"})
        assert receipt["status"] == "termination_unconfirmed"


async def test_who_resumes_a_run_attends_it_alone(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    async with car(daemon) as old, car(daemon) as viewer:
        run = await started(old)
        await viewer.call("runs.subscribe", {"run_id": run})
        async with car(daemon) as new:
            resumed = await new.call("runs.resume", {"run_id": run})
            assert resumed["resumed_from_client_id"] != resumed["client_id"]
            assert (resumed["run_id"], resumed["agent_id"]) == (run, "name:probe")
        # The old connection lives, and attends no more: nobody does, now that the new one is gone.
        ended = (await until_ended(viewer))[-1]
        assert (ended["run_status"], ended["status"]) == ("interrupted", "incomplete")
        assert (await old.call("runs.resume", {"run_id": run}))["resumed_from_client_id"] == resumed["client_id"]
        assert (await old.call("runs.get", {"run_id": run}))["status"] == "executing"
        await old.call("runs.complete", {"run_id": run, "outcome": OUTCOME})
        with pytest.raises(Refused) as refused:
            await old.call("runs.resume", {"run_id": run})
        assert refused.value.data["reason"] == "run_terminal"


async def test_agents_see_their_own_runs_alone(start: StartDaemon) -> None:
    daemon = start()
    tokens = {name: agent_token((daemon.state / "agent-key").read_text().strip(), name) for name in ("a", "b")}
    async with car(daemon, tokens["a"]) as one, car(daemon, tokens["b"]) as other:
        answer = await one.call("runs.start", {"intent": "mine"})
        assert answer["agent_id"] == "a"
        run = answer["run_id"]
        assert await other.call("runs.get_trace", {"run_id": run}) == {"run_id": run, "not_found": True}
        assert (await other.call("runs.list", {"agent_id": "a"}))["runs"] == []
        dropped = await other.call("runs.record_turns", {"run_id": run, "turns": [TURN]})
        assert dropped["dropped"] == "run_not_found"
        calls: list[tuple[str, dict[str, Any]]] = [
            ("runs.subscribe", {}),
            ("runs.complete", {"outcome": OUTCOME}),
            ("runs.resume", {}),
            ("runs.cancel", {"idempotency_key": "k", "reason": "r"}),
        ]
        for method, params in calls:
            with pytest.raises(Refused) as refused:
                await other.call(method, {"run_id": run, **params})
            assert refused.value.type == "not_found"


async def test_turns_of_many_writers_are_contiguous(daemon: Daemon) -> None:
    async with car(daemon) as agent, car(daemon) as second:
        run = await started(agent)
        answers = await asyncio.gather(
            *(
                connection.call("runs.record_turns", {"run_id": run, "turns": [{"output": number}] * 3})
                for number in range(20)
                for connection in (agent, second)
            )
        )
        assert sorted(answer["base_index"] for answer in answers) == list(range(0, 120, 3))
        trace = await agent.call("runs.get_trace", {"run_id": run})
        assert [record["index"] for record in trace["records"][1:]] == list(range(120))
