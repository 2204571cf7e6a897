"""`proposal.submit`: graphs of actions, on real connections; who submits hosts the tools, too, as the client does."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Asked, Host, polled, until_ended
from tests.peer import Peer, Refused, peer
from tests.unit.proposing import action

SLOW_S = 10_000


@asynccontextmanager
async def shaken(daemon: Daemon, *tools: str) -> AsyncIterator[tuple[Peer, Host]]:
    """A connection that speaks the dialect and hosts tools (none named: `tool`)."""
    async with peer(daemon) as own:
        await own.call("server.handshake", {"protocol_version": 3})
        host = Host(own)
        await host.register(*(tools or ("tool",)))
        yield own, host


def submitted(own: Peer, *actions: dict[str, Any], **members: Any) -> Any:
    """A proposal on its way."""
    return own.start("proposal.submit", {"proposal": {"source": "test", "actions": list(actions), **members}})


async def asked_of(host: Host, *ids: str) -> list[Asked]:
    """The requests for these actions, in this order, in whatever order they come."""
    asked = {(one := await host.asked()).params["action_id"]: one for _ in ids}
    assert asked.keys() == set(ids)
    return [asked[id_] for id_ in ids]


def came_to(answer: dict[str, Any]) -> dict[str, Any]:
    """Status, and output or error, by action."""
    return {one["action_id"]: (one["status"], one.get("output", one.get("error"))) for one in answer["results"]}


async def test_actions_run_by_what_they_depend_on_and_as_concurrently_as_that_allows(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(
            own,
            action("last", dependencies=["left", "right"], parameters={"of": ["$left.output", {"r": "$right.output"}]}),
            action("left", parameters={"q": 1}),
            action("right", timeout_ms=SLOW_S),
            id="p1",
        )
        left, right = await asked_of(host, "left", "right")
        assert (left.params["parameters"], left.params["attempt"], left.params["timeout_ms"]) == ({"q": 1}, 1, None)
        assert right.params["timeout_ms"] == SLOW_S
        await right.answer({"text": "two"})
        await left.answer([1, "one"])
        last = await host.asked()
        assert last.params["parameters"] == {"of": [[1, "one"], {"r": {"text": "two"}}]}
        await last.answer()
        answer = await answer
    assert answer["proposal_id"] == "p1"
    assert [result["action_id"] for result in answer["results"]] == ["last", "left", "right"]
    for result in answer["results"]:
        assert result["status"] == "succeeded"
        assert "error" not in result
        assert result["state_changes"] == {}
        assert result["duration_ms"] >= 0
        assert result["timestamp"].endswith("Z")
    assert [result.get("output") for result in answer["results"]] == [None, [1, "one"], {"text": "two"}]
    assert answer["cost"].pop("total_duration_ms") >= 0
    rest = {"actions_rejected": 0, "actions_skipped": 0, "retries": 0}
    assert answer["cost"] == {"tool_calls": 3, "actions_executed": 3, **rest}
    assert daemon.metrics()["proposals_open"] == daemon.metrics()["proposals_bytes"] == 0
    assert daemon.metrics()["proposals"] == 1


async def test_the_first_failure_cancels_what_runs_and_skips_the_rest(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(own, action("bad"), action("busy"), action("never", dependencies=["busy"]))
        bad, busy = await asked_of(host, "bad", "busy")
        await bad.fail("out of luck")
        assert came_to(await answer) == {
            "bad": ("failed", "out of luck"),
            "busy": ("cancelled", "action 'bad' failed, which ended the proposal"),
            "never": ("skipped", "not started: action 'bad' failed, which ended the proposal"),
        }
        told = await host.told_to_stop()
        assert told["request_id"] == busy.id
        assert told["action_id"] == "busy"
        await busy.answer("late")
        cost = (await answer)["cost"]
        assert (cost["actions_executed"], cost["actions_skipped"]) == (2, 1)
        again = submitted(own, action("a"))
        await (await host.asked()).answer("goes on")
        assert came_to(await again) == {"a": ("succeeded", "goes on")}


async def test_an_action_is_tried_again_as_often_as_it_says_and_each_try_says_which_it_is(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(own, action("a", failure_behavior="retry", max_retries=2))
        for attempt in (1, 2, 3):
            asked = await host.asked()
            assert (asked.params["action_id"], asked.params["attempt"]) == ("a", attempt)
            await asked.fail(f"no {attempt}")
        answer = await answer
        assert came_to(answer) == {"a": ("failed", "no 3")}
        assert (answer["cost"]["tool_calls"], answer["cost"]["retries"]) == (3, 2)

        answer = submitted(own, action("b", failure_behavior="retry"))
        await (await host.asked()).fail("once")
        await (await host.asked()).answer("well")
        assert came_to(await answer) == {"b": ("succeeded", "well")}
        assert daemon.metrics()["action_retries"] == 3


async def test_an_action_that_may_be_skipped_takes_its_dependents_along_and_nothing_else(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(
            own,
            action("bad", failure_behavior="skip"),
            action("after", dependencies=["bad"]),
            action("later", dependencies=["after"]),
            action("unknown", tool="none", failure_behavior="skip"),
            action("good"),
            action("better", dependencies=["good"]),
        )
        bad, good = await asked_of(host, "bad", "good")
        await bad.fail("no")
        await good.answer(1)
        await (await host.asked()).answer(2)
        answer = await answer
        words = "not started: action 'bad', which it depends on, was skipped"
        assert came_to(answer) == {
            "bad": ("skipped", "no"),
            "after": ("skipped", words),
            "later": ("skipped", words),
            "unknown": ("skipped", "unknown tool 'none'"),
            "good": ("succeeded", 1),
            "better": ("succeeded", 2),
        }
        cost = answer["cost"]
        assert [cost[f"actions_{what}"] for what in ("executed", "rejected", "skipped")] == [3, 1, 2]


async def test_a_deadline_fails_an_action_and_its_host_is_told(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(own, action("slow", timeout_ms=50))
        asked = await host.asked()
        assert (await host.told_to_stop())["request_id"] == asked.id
        assert came_to(await answer) == {"slow": ("failed", "deadline of 50 ms")}


async def test_what_is_refused_before_it_runs_fails_and_is_not_tried_again(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, _):
        await own.call("tools.register", [{"name": "typed", "parameters": {"type": "object", "required": ["q"]}}])
        for one, words in [
            (action("a", tool="none", failure_behavior="retry"), "unknown tool 'none'"),
            (action("a", tool="typed", failure_behavior="retry"), "parameters.q: it is missing"),
            (action("a", parameters=[1]), "parameters: an object is wanted"),
        ]:
            answer = await own.call("proposal.submit", {"proposal": {"actions": [one]}})
            assert came_to(answer) == {"a": ("failed", words)}
            assert (answer["cost"]["tool_calls"], answer["cost"]["actions_rejected"]) == (0, 1)


async def test_what_its_host_has_no_room_for_yet_waits_for_the_rest_of_the_proposal(daemon: Daemon) -> None:
    actions = [action(f"a{number}", parameters={"x": "x" * 100_000}) for number in range(30)]
    async with shaken(daemon) as (own, host):
        answer = submitted(own, *actions)
        for _ in actions:
            await (await host.asked()).answer()
        assert {result["status"] for result in (await answer)["results"]} == {"succeeded"}
        assert daemon.metrics()["handles_started"] == len(actions)


async def test_a_host_that_is_gone_fails_its_actions(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, _):
        async with peer(daemon) as other:
            host = Host(other)
            await host.register("theirs")
            answer = submitted(own, action("a", tool="theirs"))
            await host.asked()
        assert came_to(await answer) == {"a": ("failed", "the host's connection ended")}


@pytest.mark.parametrize("mode", ["streaming", "long_running"])
async def test_a_detached_action_is_over_when_it_runs_and_its_handle_outlives_the_proposal(
    daemon: Daemon, mode: str
) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(
            own,
            action("tail", invocation_mode=mode),
            action("next", dependencies=["tail"], parameters={"of": "$tail.output"}),
        )
        tail, following = await asked_of(host, "tail", "next")
        await following.fail("which aborts")
        answer = await answer
        assert [result["status"] for result in answer["results"]] == ["succeeded", "failed"]
        output = answer["results"][0]["output"]
        assert output == {"tool_handle": output["tool_handle"], "status": "running"}
        assert following.params["parameters"] == {"of": output}
        handle = output["tool_handle"]
        assert (await polled(own, handle))["status"] == "running"
        await tail.text("one", "two")
        await tail.answer("end")
        chunks, end = await until_ended(own, handle)
        assert [chunk.get("text") for chunk in chunks[:2]] == ["one", "two"]
        assert (end["status"], end["result"], end["action_id"]) == ("succeeded", "end", "tail")


@pytest.mark.parametrize(
    ("actions", "path", "words"),
    [
        ([action("a"), {"type": "state_write", "id": "b"}], "proposal.actions[1].type", "'state_write' is not served"),
        ([action("a", type="assertion")], "proposal.actions[0].type", "'assertion' is not served"),
        ([action("a", type="magic")], "proposal.actions[0].type", "invalid enum value 'magic'"),
        ([{"type": "tool_call", "id": "a"}], "proposal.actions[0].tool", "names its tool"),
        ([action("a", preconditions=[{"key": "k"}])], "proposal.actions[0].preconditions", "no state is kept"),
        ([action("a", state_dependencies=["k"])], "proposal.actions[0].state_dependencies", "no state is kept"),
        ([action("a", dependencies=["b"])], "proposal.actions[0].dependencies[0]", "has the id 'b'"),
        ([action("a", dependencies=["a"])], "proposal.actions[0].dependencies[0]", "'a' depends on itself"),
        ([action("a"), action("a")], "proposal.actions[1].id", "'a' is the id of proposal.actions[0] already"),
        ([action("a", failure_behavior="hope")], "proposal.actions[0].failure_behavior", "invalid enum value 'hope'"),
        ([action("a", invocation_mode="fast")], "proposal.actions[0].invocation_mode", "invalid enum value 'fast'"),
        (
            [action("x"), action("a", dependencies=["b", "x"]), action("b", dependencies=["a"])],
            "proposal.actions[1].dependencies",
            "they go in a circle: a → b → a",
        ),
    ],
)
async def test_what_is_not_served_is_refused_by_name_and_nothing_runs(
    served: Daemon, actions: list[dict[str, Any]], path: str, words: str
) -> None:
    async with shaken(served) as (own, _):
        with pytest.raises(Refused) as caught:
            await own.call("proposal.submit", {"proposal": {"actions": actions}})
        assert (caught.value.type, caught.value.data["path"]) == ("invalid_params", path)
        assert words in caught.value.error["message"]
        assert (await own.call("tools.handles"))["handles"] == []


async def test_more_actions_than_are_allowed_are_refused(start: StartDaemon) -> None:
    daemon = start(proposal_actions=2)
    async with shaken(daemon) as (own, _):
        with pytest.raises(Refused) as caught:
            await submitted(own, *(action(id_) for id_ in "abc"))
        assert (caught.value.type, caught.value.data["limit"]) == ("limit_exceeded", "proposal_actions")


async def test_large_outputs_are_whole_and_go_on_to_what_depends_on_them(daemon: Daemon) -> None:
    large = ["x" * 1_000_000, 1e100, 2**64, "\u00e9"]
    async with shaken(daemon) as (own, host):
        answer = submitted(own, action("a"), action("b", dependencies=["a"], parameters={"of": "$a.output"}))
        await (await host.asked()).answer(large)
        second = await host.asked()
        assert second.params["parameters"] == {"of": large}
        await second.answer("y" * 100_000)
        assert came_to(await answer) == {"a": ("succeeded", large), "b": ("succeeded", "y" * 100_000)}


async def test_the_largest_outputs_stay_records_where_the_answer_would_not_fit(start: StartDaemon) -> None:
    daemon = start(frame_bytes=400_000, result_inline_bytes=100_000)
    outputs = {"a": "a" * 200_000, "b": "b" * 180_000, "c": "c" * 99_000, "d": "d"}
    async with shaken(daemon) as (own, host):
        answer = submitted(own, *(action(id_) for id_ in outputs))
        for asked in await asked_of(host, *outputs):
            await asked.answer(outputs[asked.params["action_id"]])
        results = came_to(await answer)
        assert {id_: results[id_][1] for id_ in "bcd"} == {id_: outputs[id_] for id_ in "bcd"}
        reference = results["a"][1]["result_ref"]
        assert (reference["size"], reference["preview"]) == (200_002, "a" * 256)
        record = await own.call("outputs.get", {"id": reference["id"]})
        assert record["event"]["content"]["value"] == outputs["a"]


async def test_outputs_that_are_many_get_records_of_their_own_where_the_answer_would_not_fit(
    start: StartDaemon,
) -> None:
    daemon = start(frame_bytes=100_000)
    ids = [f"a{number}" for number in range(4)]
    async with shaken(daemon) as (own, host):
        answer = submitted(own, *(action(id_) for id_ in ids))
        for asked in await asked_of(host, *ids):
            await asked.answer(asked.params["action_id"] * 20_000)
        results = (await answer)["results"]
        whole = [result["output"] for result in results if isinstance(result["output"], str)]
        referred = [result["output"]["result_ref"] for result in results if isinstance(result["output"], dict)]
        assert (len(whole), len(referred)) == (2, 2)
        for reference in referred:
            record = await own.call("outputs.get", {"id": reference["id"]})
            assert len(record["event"]["content"]["value"]) == reference["size"] - 2 == 40_000


async def test_a_connection_that_ends_takes_what_runs_along_and_nothing_more_starts(daemon: Daemon) -> None:
    async with peer(daemon) as other:
        host = Host(other)
        await host.register("theirs")
        async with shaken(daemon) as (own, _):
            answer = submitted(
                own,
                action("a", tool="theirs"),
                action("b", tool="theirs", dependencies=["a"]),
                action("c", tool="theirs", failure_behavior="retry"),
            )
            first, second = await asked_of(host, "a", "c")
            await other.call("server.ping")
            own.socket.transport.abort()
            with pytest.raises(ConnectionError):
                await answer
        told = [await host.told_to_stop() for _ in range(2)]
        assert {one["request_id"] for one in told} == {first.id, second.id}
        assert {one["reason"] for one in told} == {"the connection that called it has ended"}
        await first.answer(1)
        await second.fail("no")
        await other.call("server.ping")
        assert other.pushed.empty()
        assert daemon.metrics()["proposals_open"] == 0
        assert daemon.metrics()["handles_started"] == 2


async def test_a_terminal_error_aborts_at_once_and_later_proposals_wait_for_a_new_connection(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(
            own, action("a", failure_behavior="retry"), action("b", failure_behavior="skip"), action("c")
        )
        _, asked, _ = await asked_of(host, "a", "b", "c")
        error = {"code": -32000, "message": "TerminalToolError: dead", "data": {"terminal": True}}
        await host.send({"id": asked.id, "error": error})
        results = came_to(await answer)
        assert results["b"] == ("failed", "TerminalToolError: dead")
        assert {results[id_][0] for id_ in "ac"} == {"cancelled"}
        with pytest.raises(Refused, match="reconnect") as caught:
            await submitted(own, action("d"))
        assert caught.value.type == "forbidden"
        assert (await own.call("server.ping"))["now_ms"] > 0
    async with shaken(daemon) as (own, host):
        answer = submitted(own, action("d"))
        await (await host.asked()).answer(4)
        assert came_to(await answer) == {"d": ("succeeded", 4)}


async def test_proposals_of_one_connection_are_independent(daemon: Daemon) -> None:
    async with shaken(daemon, "one", "two") as (own, host):
        first = submitted(own, action("a", tool="one"))
        second = submitted(own, action("a", tool="two"))
        asked = {(one := await host.asked()).params["tool"]: one for _ in range(2)}
        await asked["two"].fail("no")
        assert came_to(await second) == {"a": ("failed", "no")}
        assert not first.done()
        assert daemon.metrics()["proposals_open"] == 1
        await asked["one"].answer("yes")
        assert came_to(await first) == {"a": ("succeeded", "yes")}


async def test_a_proposal_is_answered_when_the_daemon_drains(daemon: Daemon) -> None:
    async with shaken(daemon) as (own, host):
        answer = submitted(
            own,
            action("a", failure_behavior="skip"),
            action("b", dependencies=["a"]),
            action("tail", invocation_mode="streaming"),
        )
        await asked_of(host, "a", "tail")
        stopped = asyncio.create_task(asyncio.to_thread(daemon.terminate))
        results = came_to(await answer)
        assert results["a"] == ("skipped", "the daemon stops")
        assert results["b"][0] == "skipped"
    assert await stopped == 0


async def test_actions_are_part_of_the_run_that_the_connection_has_started_until_it_completes_it(
    daemon: Daemon,
) -> None:
    async with shaken(daemon) as (own, host), peer(daemon) as other:
        run_id = (await own.call("runs.start", {"intent": "test", "agent_id": "a"}))["run_id"]
        answer = submitted(own, action("a"))
        asked = await host.asked()
        assert asked.params["run_id"] == run_id
        await asked.answer("one")
        assert came_to(await answer) == {"a": ("succeeded", "one")}
        trace = await own.call("runs.get_trace", {"run_id": run_id})
        (turn,) = [record for record in trace["records"] if record["record"] == "turn"]
        begun = trace["records"][1]["event"]
        assert begun["type"] == "tool_start"
        assert turn == {
            "record": "turn",
            "index": trace["records"].index(turn) - 1,
            "action_id": "a",
            "tool": begun["name"],
            "parameters": {},
            "output": "one",
            "status": "succeeded",
            "handle": begun["id"],
            "verifier_verdict": "not_run",
        }
        answer = submitted(own, action("b", failure_behavior="retry"))
        await host.asked()
        await other.call("runs.cancel", {"run_id": run_id, "reason": "enough"})
        (cancelled,) = (await answer)["results"]
        assert (cancelled["status"], cancelled["error"]) == ("cancelled", "its run is over")
        assert cancelled["not_recorded"] == f"run {run_id!r} is cancelled: it takes no more turns"
        with pytest.raises(Refused) as refused:
            await submitted(own, action("never"))
        assert refused.value.data["reason"] == "run_terminal"
        assert "runs.start begins another one, runs.resume goes on with one" in str(refused.value)

        run_id = (await own.call("runs.start", {"intent": "test", "agent_id": "a"}))["run_id"]
        outcome = {
            "status": "success",
            "summary": "",
            "evidence": [],
            "metrics": {},
            "timestamp": "2026-11-20T00:00:00Z",
        }
        await own.call("runs.complete", {"run_id": run_id, "outcome": outcome})
        answer = submitted(own, action("c"))
        asked = await host.asked()
        assert "run_id" not in asked.params
        await asked.answer("two")
        assert came_to(await answer) == {"c": ("succeeded", "two")}


async def test_what_the_client_sent_is_answered_with_what_it_took(daemon: Daemon) -> None:
    frame = {"dependencies": [], "id": "c1", "parameters": {"q": 1}, "timeout_ms": 50_000, "tool": "echo"}
    async with shaken(daemon, "echo") as (own, host):
        answer = own.start(
            "proposal.submit", {"proposal": {"actions": [{**frame, "type": "tool_call"}], "source": "m"}}
        )
        asked = await host.asked()
        await asked.answer({"echo": asked.params["parameters"]})
        (result,) = (await answer)["results"]
        assert {"action_id", "status", "output", "state_changes", "timestamp"} <= result.keys()
        assert json.dumps(result["output"]) == '{"echo": {"q": 1}}'


@pytest.mark.parametrize("in_run", [False, True])
async def test_parameters_that_are_more_than_an_outbox_are_sent_as_the_host_reads(daemon: Daemon, in_run: bool) -> None:
    async with shaken(daemon) as (own, host):
        if in_run:
            await own.call("runs.start", {"intent": "test", "agent_id": "a"})
        ids = [f"a{number}" for number in range(6)]
        answer = submitted(own, *(action(id_, parameters={"x": "y" * 600_000}) for id_ in ids))
        for _ in ids:
            asked = await host.asked()
            await asked.answer(asked.params["action_id"])
        assert came_to(await answer) == {id_: ("succeeded", id_) for id_ in ids}


async def test_a_run_within_another_is_the_proposals_run_until_it_is_complete_and_then_the_outer_one_is(
    daemon: Daemon,
) -> None:
    async with shaken(daemon) as (own, host):

        async def run_of_a_proposal() -> str | None:
            answer = submitted(own, action("a"))
            asked = await host.asked()
            await asked.answer()
            await answer
            run_id: str | None = asked.params.get("run_id")
            return run_id

        async def started() -> str:
            run_id: str = (await own.call("runs.start", {"intent": "test", "agent_id": "a"}))["run_id"]
            return run_id

        async def complete(run_id: str) -> None:
            await own.call("runs.complete", {"run_id": run_id, "outcome": {"status": "success"}})

        outer, over, inner = await started(), await started(), await started()
        assert await run_of_a_proposal() == inner
        await own.call("runs.fail", {"run_id": over, "error": "it is of no use"})
        await complete(inner)
        assert await run_of_a_proposal() == outer
        await complete(outer)
        assert await run_of_a_proposal() is None
