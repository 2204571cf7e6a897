"""The real client of version 0.31.0, which speaks protocol version 1, and what was before it, which makes no handshake.

It knows runs_start, runs_complete, the registrations, submit_proposal and its two handlers, and nothing else of ours.
"""

import contextlib
import json
from typing import Any

import pytest

from tests.carclient import OLD, CarClient, CarError, car_client, needs_old_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import peer
from tests.unit.proposing import action

MIB = 1024 * 1024
UNSERVED: list[tuple[str, str, tuple[Any, ...]]] = [
    ("register_policy", "policy.register", ("no rm", "deny_tool", "rm")),
    ("register_agent_basics", "agents.register_basics", ()),
    ("verify_proposal", "verify", ({"actions": [action("a")]},)),
]


async def started(car: CarClient, **members: Any) -> str:
    """A run of its own."""
    run_id: str = (await car.call("runs_start", {"intent": "fix", "agent_name": "Old One", **members}))["run_id"]
    return run_id


async def submitted(car: CarClient, *actions: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a proposal."""
    results: list[dict[str, Any]] = (await car.call("submit_proposal", {"actions": list(actions)}))["results"]
    return results


@needs_old_car
async def test_runs_that_the_old_client_leaves_with_each_outcome_are_read_natively(served: Daemon) -> None:
    async with car_client(served, OLD) as car, peer(served) as native:
        await car.call("register_tool", "look")
        car.tools["look"] = lambda parameters: {"found": parameters["what"]}
        for status in ("success", "partial_success", "done", "give_up", "timeout", "failure"):
            run_id = await started(car, agent_id="old", outcome_description="it is fixed")
            (result,) = await submitted(car, action("a", tool="look", parameters={"what": status}))
            assert (result["status"], result["output"]) == ("succeeded", {"found": status})
            evidence = [{"kind": "test", "description": "green", "data": {"count": 3}}]
            outcome = {"status": status, "summary": f"so: {status}", "evidence": evidence, "metrics": {"turns": 1}}
            completed = {"run_id": run_id, "outcome": outcome}
            assert await car.call("runs_complete", completed) == {"run_id": run_id, "ok": True}
            with pytest.raises(CarError, match=r"-32011 .*already"):
                await car.call("runs_complete", completed)

            run = await native.call("runs.get", {"run_id": run_id})
            completes = status in ("success", "partial_success", "done")
            assert run["status"] == ("completed" if completes else "failed")
            assert run["result_text" if completes else "error"] == f"so: {status}"
            assert (run["prompt"], run["agent_id"], run["outcome_description"]) == ("fix", "old", "it is fixed")
            log = (await native.call("runs.events", {"run_id": run_id}))["events"]
            assert [entry["sequence"] for entry in log] == list(range(run["event_count"]))
            events = [entry["event"] for entry in log]
            assert [event["name"] for event in events if event["type"] in ("tool_start", "tool_end")] == ["look"] * 2
            ended = (await native.call("runs.get_trace", {"run_id": run_id}))["records"][-1]
            assert ended["termination"] == {"kind": "outcome", "outcome": outcome}


@needs_old_car
async def test_the_old_client_hosts_tools_by_name_and_by_schema_and_a_cancel_reaches_it_when_its_handler_is_out(
    daemon: Daemon,
) -> None:
    async with car_client(daemon, OLD) as car, peer(daemon) as native:
        await car.call("register_tool", "slow")
        whole = {"description": "Looks.", "parameters": {"type": "object", "required": ["what"]}, "idempotent": True}
        await car.call("register_tool_schema", {"name": "look", **whole, "timeoutMs": 5, "returns": None})
        listed = {tool["name"]: tool for tool in (await native.call("tools.list"))["tools"]}
        assert listed.keys() == {"slow", "look"}
        assert whole.items() <= listed["look"].items()

        proposal = car.start("submit_proposal", {"actions": [action("a", tool="slow", timeout_ms=20)]})
        asked = await car.asked()
        assert (asked.call["tool"], asked.call["action_id"], asked.call["params"]) == ("slow", "a", {})
        await daemon.until("handle_deadlines", 1)
        await asked.answers({"too": "late"})
        assert await car.cancelled() == asked.call["request_id"]
        (result,) = (await proposal)["results"]
        assert (result["status"], result["error"]) == ("failed", "deadline of 20 ms")

        car.tools["look"] = lambda parameters: {"found": parameters["what"]}
        refused, found = await submitted(
            car,
            action("a", tool="look", failure_behavior="skip"),
            action("b", tool="look", parameters={"what": 1}),
        )
        assert (refused["status"], "what" in refused["error"]) == ("skipped", True)
        assert (found["status"], found["output"]) == ("succeeded", {"found": 1})
        scope = {"callerId": "c", "tenantId": "t", "claims": {}}  # what else the call takes
        failing = car.start("submit_proposal", {"actions": [action("a", tool="slow")]}, "a session", scope)
        await (await car.asked()).raises("ValueError", "boom")
        (result,) = (await failing)["results"]
        assert (result["status"], "ValueError: boom" in result["error"]) == ("failed", True)


@needs_old_car
async def test_a_run_that_the_old_client_leaves_open_is_interrupted_and_read_natively(start: StartDaemon) -> None:
    daemon = start(grace_s=0.05)
    async with peer(daemon) as native:
        async with car_client(daemon, OLD) as car:
            run_id = await started(car)
            await car.call("register_tool", "look")
            asking = car.start("submit_proposal", {"actions": [action("a", tool="look")]})
            await car.asked()
            await car.kill()
            with pytest.raises(ConnectionError):
                await asking
        await daemon.until("runs_interrupted", 1)
        run = await native.call("runs.get", {"run_id": run_id})
        assert (run["status"], run["agent_id"], run["prompt"]) == ("interrupted", "name:Old One", "fix")
        events = [entry["event"] for entry in (await native.call("runs.events", {"run_id": run_id}))["events"]]
        (end,) = (event for event in events if event["type"] == "tool_end")
        assert end["error"] == "the host's connection ended"


@needs_old_car
async def test_what_the_daemon_does_not_serve_is_refused_with_a_hint_and_a_module_of_methods_serves_it(
    served: Daemon, start: StartDaemon
) -> None:
    async with car_client(served, OLD) as car:
        for call, method, arguments in UNSERVED:
            hint = rf"-32601 no method '{method}'; there are: .*capabilities\.list lists all; .*serve --methods MODULE"
            with pytest.raises(CarError, match=hint):
                await car.call(call, *arguments)
        with pytest.raises(CarError, match="not exposed"):  # says the client itself
            await car.call("execute_proposal", {"actions": []}, "a function")
        assert await started(car)
    async with car_client(start("--methods", "tests.car_methods"), OLD) as car:
        answers = [await car.call(call, *arguments) for call, _, arguments in UNSERVED]
        assert answers == [None, None, {"valid": True, "issues": []}]
        assert (await car.call("verify_proposal", {"actions": []}))["issues"] == ["it does nothing"]


@needs_old_car
async def test_no_answer_is_larger_than_the_old_client_takes(served: Daemon) -> None:
    sizes = {"small": 1 * MIB, "large": 9 * MIB, "other": 9 * MIB, "too large": 16 * MIB - 4096}
    async with car_client(served, OLD) as car, peer(served) as native:
        await car.call("register_tool", "make")
        car.tools["make"] = lambda parameters: "x" * sizes[parameters["what"]]
        results = await submitted(
            car,
            *(action(name, tool="make", parameters={"what": name}, failure_behavior="skip") for name in sizes),
        )
        small, *large, too_large = results
        assert small["output"] == "x" * MIB
        (whole,) = (result for result in large if isinstance(result["output"], str))
        assert whole["output"] == "x" * (9 * MIB)
        (elsewhere,) = (result["output"]["result_ref"] for result in large if result is not whole)
        assert elsewhere["size"] == 9 * MIB + 2  # as JSON
        kept = await native.call("outputs.get", {"id": elsewhere["id"]})
        assert kept["event"]["content"]["value"] == "x" * (9 * MIB)
        assert too_large["status"] == "skipped"
        assert "result_bytes" in too_large["error"]
        assert await started(car)  # and it lives on

        sizes["huge"] = 17 * MIB  # the connection ends: the daemon reads no such message
        with pytest.raises(CarError, match=r"rpc channel closed for proposal\.submit"):
            await submitted(car, action("a", tool="make", parameters={"what": "huge"}))
        again = ""
        while not again:  # this version finds out at its next call, and then connects anew
            with contextlib.suppress(CarError):
                again = await started(car)


async def test_clients_of_before_the_handshake_register_tools_and_submit_proposals_as_they_did(served: Daemon) -> None:
    async with peer(served, None) as caller:

        async def sent(**members: Any) -> Any:
            """What comes after a frame."""
            return await caller.raw(json.dumps({"jsonrpc": "2.0", **members}))

        assert "result" in await sent(id=0, method="session.auth", params={"token": served.token()})
        registered = await sent(id=1, method="tools.register", params=[{"name": "look"}])
        assert (registered["id"], registered["result"]) == (1, 1)
        proposal = {"actions": [action("a", tool="look", parameters={"what": 1})]}
        asked = await sent(id=2, method="proposal.submit", params={"proposal": proposal, "session_id": "s"})
        assert asked["method"] == "tools.execute"
        assert {"tool": "look", "parameters": {"what": 1}}.items() <= asked["params"].items()
        answer = await sent(id=asked["id"], result={"ok": 1})
        (result,) = answer["result"]["results"]
        assert (answer["id"], result["status"], result["output"]) == (2, "succeeded", {"ok": 1})
        refused = await sent(id=3, method="policy.register", params={"name": "p"})
        assert (refused["id"], refused["error"]["code"]) == (3, -32601)
        assert "there are: " in refused["error"]["data"]["hint"]
