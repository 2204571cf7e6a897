"""Proposals of the real client, which hosts their tools itself: graphs, failures, deadlines, and what lasts longer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.carclient import Asked, CarClient, CarError, car_client, needs_car
from tests.daemon import Daemon
from tests.hosting import hosted
from tests.trace import until_at_most
from tests.unit.proposing import action

pytestmark = needs_car

MIB = 1024 * 1024
THREADS = 4
Way = Callable[..., Awaitable[list[dict[str, Any]]]]


def submits(car: CarClient, *actions: dict[str, Any], on: str = "runtime") -> "asyncio.Task[list[dict[str, Any]]]":
    """The results of a proposal, which is under way."""

    async def results() -> list[dict[str, Any]]:
        answer = await car.call("submit_proposal", {"actions": list(actions)}, on=on)
        return list(answer["results"])

    return asyncio.create_task(results())


def executes(car: CarClient, *actions: dict[str, Any]) -> "asyncio.Task[list[dict[str, Any]]]":
    """Likewise, with a handler of its own."""

    async def results() -> list[dict[str, Any]]:
        return list((await car.execute_proposal({"actions": list(actions)}))["results"])

    return asyncio.create_task(results())


def statuses(results: list[dict[str, Any]]) -> dict[str, str]:
    """By the actions' ids."""
    return {result["action_id"]: result["status"] for result in results}


async def asked_of(car: CarClient, tool: str) -> Asked:
    """The next call, which is of this tool."""
    asked = await car.asked()
    assert asked.call["tool"] == tool
    return asked


@pytest.mark.parametrize("way", [submits, executes])
async def test_the_clients_tools_are_called_in_the_order_of_the_dependencies_with_the_outputs_before(
    served: Daemon, way: Way
) -> None:
    async with car_client(served) as car:
        for tool in ("look", "join"):
            await car.call("register_tool", tool)
        both = {"parts": ["$left.output", {"right": "$right.output"}], "not one": "see $left.output"}
        results = way(
            car,
            action("last", tool="join", parameters=both, dependencies=["left", "right"], timeout_ms=40_000),
            action("left", tool="look", parameters={"for": "left"}, dependencies=["first"]),
            action("right", tool="look", parameters={"for": "$first.output"}, dependencies=["first"]),
            action("first", tool="look", parameters={"for": "first"}),
        )
        first = await asked_of(car, "look")
        assert first.call.pop("request_id")
        assert first.call.pop("session_id")
        told = {"action_id": "first", "params": {"for": "first"}, "tool": "look", "attempt": 1, "timeout_ms": None}
        assert first.call == told
        await first.answers([1, "one"])
        between = [await car.asked()]  # it serves one at a time
        await between[0].answers({"found": between[0].call["params"]["for"]})
        between.append(await car.asked())
        await between[1].answers({"found": between[1].call["params"]["for"]})
        assert sorted(asked.call["action_id"] for asked in between) == ["left", "right"]
        last = await asked_of(car, "join")
        assert last.call["params"] == {
            "parts": [{"found": "left"}, {"right": {"found": [1, "one"]}}],
            "not one": "see $left.output",
        }
        assert last.call["timeout_ms"] == 40_000
        await last.answers(None)
        ended = await results
    assert set(statuses(ended).values()) == {"succeeded"}
    assert [result["action_id"] for result in ended] == ["last", "left", "right", "first"]
    outputs = [result.get("output") for result in ended]
    assert outputs == [None, {"found": "left"}, {"found": [1, "one"]}, [1, "one"]]


async def test_actions_that_depend_on_nothing_run_at_once_here_and_elsewhere(served: Daemon) -> None:
    async with car_client(served) as car, hosted(served, "elsewhere") as (_, host):
        await car.call("register_tool", "here")
        results = submits(
            car,
            action("held", tool="here"),
            action("quick", tool="elsewhere"),
            action("next", tool="elsewhere", parameters={"of": "$quick.output"}, dependencies=["quick"]),
        )
        held = await asked_of(car, "here")
        await (await host.asked()).answer("done")
        after = await host.asked()
        assert after.params["parameters"] == {"of": "done"}
        await after.answer("too")
        await held.answers("at last")
        assert [result["output"] for result in await results] == ["at last", "done", "too"]


async def test_a_failure_says_what_went_wrong_and_what_depends_on_it_is_not_begun(served: Daemon) -> None:
    ways: list[tuple[Callable[[Asked], Awaitable[None]], str]] = [
        (lambda asked: asked.raises("ValueError", "grün ist die Heide"), "ValueError: grün ist die Heide"),
        (lambda asked: asked.returns("no json"), "invalid tool result JSON"),
        (lambda asked: asked.returns(None), "must return str"),
    ]
    async with car_client(served) as car:
        await car.call("register_tool", "tool")
        for fails, words in ways:
            results = submits(car, action("a"), action("b", dependencies=["a"]))
            await fails(await car.asked())
            failed, skipped = await results
            assert (failed["status"], skipped["status"]) == ("failed", "skipped")
            assert words in failed["error"]
            assert "'a' failed, which ended the proposal" in skipped["error"]
            assert "output" not in failed | skipped
        results = submits(car, action("a"))
        await (await car.asked()).answers({"error": "none", "rows": 0})  # what has more members is no failure
        assert (await results)[0]["output"] == {"error": "none", "rows": 0}
        (unknown,) = await submits(car, action("a", tool="no such tool"))
        assert (unknown["status"], "'no such tool'" in unknown["error"]) == ("failed", True)


async def test_a_result_that_is_an_error_and_nothing_else_is_a_failure(served: Daemon) -> None:
    async with car_client(served) as car:
        await car.call("register_tool", "tool")
        results = submits(car, action("a"))
        await (await car.asked()).answers({"error": "no such file"})
        (result,) = await results
        assert (result["status"], result["error"]) == ("failed", "no such file")


async def test_an_action_is_tried_again_as_it_says_and_one_that_may_be_skipped_ends_nothing_else(
    served: Daemon,
) -> None:
    async with car_client(served) as car:
        for tool in ("flaky", "broken", "fine"):
            await car.call("register_tool", tool)
        results = submits(car, action("a", tool="flaky", failure_behavior="retry", max_retries=2, parameters={"x": 1}))
        requests = set()
        for attempt in (1, 2, 3):
            asked = await asked_of(car, "flaky")
            assert (asked.call["attempt"], asked.call["params"]) == (attempt, {"x": 1})
            requests.add(asked.call["request_id"])
            if attempt < 3:
                await asked.raises("OSError", f"try {attempt}")
            else:
                await asked.answers("at last")
        (result,) = await results
        assert (result["status"], result["output"], len(requests)) == ("succeeded", "at last", 3)

        results = submits(car, action("a", tool="flaky", failure_behavior="retry", max_retries=1))
        for attempt in (1, 2):
            await (await asked_of(car, "flaky")).raises("OSError", f"try {attempt}")
        (result,) = await results
        assert (result["status"], "OSError: try 2" in result["error"]) == ("failed", True)

        car.tools["fine"] = lambda _: "fine"
        results = submits(
            car,
            action("bad", tool="broken", failure_behavior="skip"),
            action("on it", tool="fine", dependencies=["bad"]),
            action("good", tool="fine"),
            action("more", tool="fine", dependencies=["good"]),
        )
        await (await asked_of(car, "broken")).raises("ValueError", "boom")
        expected = {"bad": "skipped", "on it": "skipped", "good": "succeeded", "more": "succeeded"}
        assert statuses(await results) == expected


async def test_a_failure_elsewhere_and_a_deadline_stop_what_the_client_runs_by_its_request_id(served: Daemon) -> None:
    async with car_client(served) as car, hosted(served, "fails") as (_, host):
        await car.call("register_tool", "slow")
        results = submits(car, action("held", tool="slow"), action("next", tool="slow"), action("bad", tool="fails"))
        held = await asked_of(car, "slow")
        await (await host.asked()).fail("no disk")
        stopped = {await car.cancelled(), await car.cancelled()}  # two were sent, one of them waits for the handler
        assert held.call["request_id"] in stopped
        ended = await results  # although the handler still runs
        assert statuses(ended) == {"held": "cancelled", "next": "cancelled", "bad": "failed"}
        assert ended[2]["error"] == "no disk"
        await held.answers("too late")
        await (await asked_of(car, "slow")).answers("too late")  # the client begins it although it was told to stop it

        results = submits(car, action("a", tool="slow", timeout_ms=20))
        asked = await asked_of(car, "slow")
        assert asked.call["timeout_ms"] == 20
        assert await car.cancelled() == asked.call["request_id"]
        (result,) = await results
        assert (result["status"], result["error"]) == ("failed", "deadline of 20 ms")
        await asked.answers("too late")
        results = submits(car, action("a", tool="slow"))  # what came too late belongs to nothing
        await (await asked_of(car, "slow")).answers("in time")
        assert (await results)[0]["output"] == "in time"


@pytest.mark.parametrize("way", [submits, executes])
async def test_after_a_terminal_error_the_client_submits_nothing_more_until_it_reconnects(
    served: Daemon, way: Way
) -> None:
    async with car_client(served) as car:
        await car.call("register_tool", "tool")
        results = way(car, action("a", failure_behavior="retry"), action("b", dependencies=["a"]))
        await (await car.asked()).raises("TerminalToolError", "the disk is gone")
        failed, skipped = await results  # it is not tried again
        assert (failed["status"], skipped["status"]) == ("failed", "skipped")
        assert "the disk is gone" in failed["error"]
        with pytest.raises(CarError, match=r"-32003 .*'tool' .*'a'.* failed for good.*reconnect"):
            await way(car, action("a"))
        assert len(await car.call("list_tools")) >= 1  # all else goes on
        epoch = await car.call("connection_epoch")
        await car.call("close")
        await car.reconnected(epoch)
        await car.call("register_tool", "tool")
        results = way(car, action("a"))
        await (await car.asked()).answers("well")
        assert (await results)[0]["output"] == "well"


async def test_a_streaming_action_is_over_when_it_runs_and_the_client_polls_it_to_its_end(served: Daemon) -> None:
    async with car_client(served) as car, hosted(served, "tails") as (_, host):
        await car.call("register_tool", "tool")
        car.tools["tool"] = lambda parameters: parameters
        streams = action("s", tool="tails", invocation_mode="streaming")
        results = await submits(car, streams, action("a", parameters={"of": "$s.output"}, dependencies=["s"]))
        handle = results[0]["output"]["tool_handle"]
        assert results[0]["output"] == {"tool_handle": handle, "status": "running"}
        assert results[1]["output"] == {"of": results[0]["output"]}
        polled = await car.call("tool_poll", handle)
        assert (polled["status"], polled["action_id"], polled["chunks"]) == ("running", "s", [])
        asked = await host.asked()
        await asked.text("one", "two")
        waited = await car.call("tools_poll", {"handle": handle, "wait_ms": 10_000})
        texts = [chunk["text"] for chunk in waited["chunks"]]
        while len(texts) < 2:
            waited = await car.call("tools_poll", {"handle": handle, "wait_ms": 10_000})
            texts += [chunk["text"] for chunk in waited["chunks"]]
        assert texts == ["one", "two"]
        await asked.answer({"lines": 2})
        last = await car.call("tools_poll", {"handle": handle, "wait_ms": 10_000})
        assert (last["status"], last["result"], last["chunks"][-1]["kind"]) == ("succeeded", {"lines": 2}, "done")
        assert (await car.call("tool_poll", handle))["chunks"] == []
        assert await car.call("tool_poll", handle) is None

        # One of the client's own, which the proposal does not wait for either.
        await car.call("register_tool", "long")
        (result,) = await submits(car, action("l", tool="long", invocation_mode="long_running"))
        asked_here = await asked_of(car, "long")
        handle = result["output"]["tool_handle"]
        assert await car.call("tool_cancel", handle) is True
        assert await car.cancelled() == asked_here.call["request_id"]
        assert (await car.call("tool_poll", handle))["status"] == "cancelled"


@pytest.mark.parametrize("mebibytes", [1, 10])
async def test_a_large_output_comes_whole_and_goes_on_to_what_depends_on_it(served: Daemon, mebibytes: int) -> None:
    text = "ü" * (mebibytes * MIB // 2)
    async with car_client(served) as car:
        for tool in ("makes", "counts"):
            await car.call("register_tool", tool)
        car.tools = {"makes": lambda _: text, "counts": lambda parameters: len(parameters["of"])}
        count = action("b", tool="counts", parameters={"of": "$a.output"}, dependencies=["a"])
        made, counted = await submits(car, action("a", tool="makes"), count)
    assert made["output"] == text
    assert counted["output"] == len(text)


async def test_proposals_of_four_threads_are_open_at_once_and_each_gets_its_own_results(served: Daemon) -> None:
    async with car_client(served) as car, hosted(served, "gate") as (_, host):
        await car.call("register_tool", "tool")
        car.tools["tool"] = lambda parameters: parameters["n"]
        each = [
            submits(
                car,
                action("a", tool="gate", parameters={"n": number}),
                action("b", parameters={"n": "$a.output"}, dependencies=["a"]),
            )
            for number in range(THREADS)
        ]
        held = [await host.asked() for _ in range(THREADS)]  # so all of them are open
        for asked in reversed(held):
            await asked.answer(asked.params["parameters"]["n"] * 10)
        for number, results in enumerate(each):
            assert [result["output"] for result in await results] == [number * 10, number * 10]


async def test_what_is_no_graph_is_refused_by_name_and_a_client_that_is_killed_leaves_nothing_open(
    served: Daemon,
) -> None:
    async with car_client(served) as car, hosted(served, "other") as (_, host):
        await car.call("register_tool", "tool")
        refused: list[tuple[list[dict[str, Any]], str]] = [
            ([action("a", dependencies=["x"])], r"actions\[0\]\.dependencies.*'x'"),
            ([action("a", dependencies=["b"]), action("b", dependencies=["a"])], "circle"),
            ([action("a", type="state_write")], r"actions\[0\]\.type"),
        ]
        for actions, words in refused:
            with pytest.raises(CarError, match=f"-32602 .*{words}"):
                await submits(car, *actions)
        results = submits(car, action("a"), action("b", tool="other"), action("c", tool="other", dependencies=["b"]))
        await car.asked()
        asked = await host.asked()
        await car.kill()
        with pytest.raises(ConnectionError):
            await results
        assert (await host.told_to_stop())["request_id"] == asked.id
        await asked.answer("done")
        await until_at_most(served, "proposals_open", 0)  # and `c` will never begin
