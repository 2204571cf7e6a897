"""The agent loop of the real client, `car_runtime.agent_loop.run_agent`, unmodified, on this daemon alone.

What it asks for beyond runs, tools and proposals, a model too, a module of methods serves: `tests.car_methods`.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.carclient import CarClient, CarError, car_client, needs_car
from tests.daemon import Daemon, running
from tests.peer import Peer, peer

pytestmark = needs_car

LOOKUP: dict[str, Any] = {
    "name": "lookup",
    "description": "Looks a key up.",
    "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
}
POLICY = {"name": "no rm", "rule": "deny_tool", "target": "rm"}
TURNS = 3  # at most, of the model


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has a model."""
    with running(tmp_path_factory.mktemp("modelled") / "state", "--methods", "tests.car_methods") as daemon:
        yield daemon


def config(name: str, **members: Any) -> dict[str, Any]:
    """What an agent is made of."""
    made = {"agent_name": name, "identity": "Use lookup.", "tool_schemas": [LOOKUP], "policies": []}
    return made | {"max_turns": TURNS, "default_model": "a-model", **members}


async def until_whole(native: Peer, run_id: str, calls: int) -> list[dict[str, Any]]:
    """The records of a run, once the end of each call is among them: that is stored beside everything else."""
    while True:
        trace = await native.call("runs.get_trace", {"run_id": run_id})
        records: list[dict[str, Any]] = trace["records"]
        if [name for name, _ in events(records)].count("tool_end") == calls:
            return records
        await asyncio.sleep(0.02)


def events(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The type and the tool of each event."""
    return [(one["event"]["type"], one["event"]["name"]) for one in records if one["record"] == "event"]


def of(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of a kind."""
    return [record for record in records if record["record"] == kind]


async def test_agents_whose_tools_have_the_same_names_run_at_once_and_each_leaves_its_own_run_whole(
    modelled: Daemon,
) -> None:
    async with car_client(modelled) as one, car_client(modelled) as two, peer(modelled) as native:
        cars: dict[str, CarClient] = {"one": one, "two": two}
        agents = {
            name: asyncio.create_task(car.run_agent(config(name, policies=[POLICY]), f"the {name}"))
            for name, car in cars.items()
        }
        asked = {name: await car.asked() for name, car in cars.items()}  # both are in the middle of it
        for name, call in asked.items():
            assert call.call == {"tool": "lookup", "params": {"key": f"the {name}"}}
            await call.answers({"value of": name})
        for name, agent in agents.items():
            found = {"value of": name}
            said = f'it is {{"value of": "{name}"}}'
            outcome = await agent
            assert (outcome["status"], outcome["summary"]) == ("success", said)
            assert outcome["tools_called"] == ["finish", "lookup"]
            told = {"turns": 2, "tool_calls": 2, "actions_succeeded": 2, "actions_failed": 0}
            assert outcome["metrics"] == told

            run_id = outcome.pop("run_id")
            records = await until_whole(native, run_id, calls=2)
            started, *between, ended = records
            assert (started["record"], started["agent_id"], started["intent"]) == ("started", name, f"the {name}")
            steps = [record for record in between if record["record"] != "event"]
            assert [step["record"] for step in steps] == ["model_turn", "turn"] * 2
            assert [record.get("index", record.get("sequence")) for record in between] == list(range(len(between)))
            for step, (tool, parameters, output) in zip(
                of(records, "turn"),
                [("lookup", {"key": f"the {name}"}, found), ("finish", {"answer": said}, {"answer": said})],
                strict=True,
            ):
                assert (step["tool"], step["parameters"], step["output"]) == (tool, parameters, output)
                assert step["verifier_verdict"] == "not_run"
            wanted = [[call["name"] for call in turn["requested_tool_calls"]] for turn in of(records, "model_turn")]
            assert wanted == [["lookup"], ["finish"]]
            assert {turn["model_id"] for turn in of(records, "model_turn")} == {"a-model"}
            assert sorted(events(records)) == [
                (type_, tool) for type_ in ("tool_end", "tool_start") for tool in ("finish", "lookup")
            ]
            assert (ended["record"], ended["run_status"], ended["result_text"]) == ("ended", "completed", said)
            assert ended["termination"] == {"kind": "outcome", "outcome": outcome}
            own = (await cars[name].call("runs_get_trace", {"run_id": run_id}))["records"]
            assert own == records
        # The policy stands: the module that has it tells whoever asks.
        denied = {"actions": [{"id": "a", "type": "tool_call", "tool": "rm", "parameters": {}, "dependencies": []}]}
        assert await one.call("verify_proposal", denied) == {"valid": False, "issues": ["tool 'rm' is denied"]}


async def test_a_tool_that_fails_is_told_to_the_model_and_stands_in_the_run_and_the_next_run_is_another(
    modelled: Daemon,
) -> None:
    async with car_client(modelled) as car, peer(modelled) as native:
        agent = asyncio.create_task(car.run_agent(config("failing"), "a key"))
        await (await car.asked()).raises("KeyError", "no such key")
        outcome = await agent
        assert outcome["status"] == "success"
        assert "no such key" in outcome["summary"]  # the model has it from the loop, and says it
        records = await until_whole(native, outcome["run_id"], calls=2)
        failed, finished = of(records, "turn")
        assert (failed["tool"], finished["tool"]) == ("lookup", "finish")
        assert "no such key" in failed["output"]["error"]
        assert records[-1]["run_status"] == "completed"

        car.tools["lookup"] = lambda parameters: parameters  # the loop does not register its tools again
        again = await car.run_agent(config("failing"), "another key")
        assert again["summary"] == 'it is {"key": "another key"}'
        assert [turn["tool"] for turn in of(await until_whole(native, again["run_id"], 2), "turn")] == [
            "lookup",
            "finish",
        ]
        assert await until_whole(native, outcome["run_id"], calls=2) == records


async def test_an_agent_whose_run_is_cancelled_has_its_tool_stopped_and_starts_no_other(modelled: Daemon) -> None:
    async with car_client(modelled) as car, peer(modelled, "host-token") as host:
        await car.listen("tools.cancel")
        agent = asyncio.create_task(car.run_agent(config("cancelled", agent_id="cancelled"), "a key"))
        await car.asked()
        (run,) = (await host.call("runs.list", {"agent_id": "cancelled"}))["runs"]
        cancelled = await host.call("runs.cancel", {"run_id": run["id"], "reason": "enough"})
        assert cancelled == {"cancelled": True, "status": "cancelled"}
        notified = await car.notified()
        assert (notified.method, notified.params["reason"]) == ("tools.cancel", "its run is over")
        # The loop is told when it comes with its next proposal: it ends there, and spends no more turns of its model.
        outcome = await agent
        assert (outcome["run_id"], outcome["status"]) == (run["id"], "failure")
        assert f"run {run['id']!r} is over" in outcome["summary"]
        assert outcome["metrics"]["actions_succeeded"] == 0
        records = await until_whole(host, run["id"], calls=1)
        assert sorted(events(records)) == [("tool_end", "lookup"), ("tool_start", "lookup")]
        assert len(of(records, "model_turn")) == 1
        assert records[-1]["run_status"] == "cancelled"
        assert (await host.call("runs.get", {"run_id": run["id"]}))["status"] == "cancelled"


async def test_without_the_methods_of_a_module_an_agent_fails_in_words_that_say_what_is_missing(served: Daemon) -> None:
    missing = r"-32601 no method '{}'; there are: .*capabilities\.list lists all; .*serve --methods MODULE"
    async with car_client(served) as car, peer(served) as native:
        with pytest.raises(CarError, match=missing.format(r"policy\.register")):
            await car.run_agent(config("strict", policies=[POLICY]), "a key")
        assert (await native.call("runs.list", {"agent_id": "strict"}))["runs"] == []
        outcome = await car.run_agent(config("alone"), "a key")  # on the same runtime
        assert outcome["status"] == "failure"
        assert "-32601 no method 'infer'; there are: " in outcome["summary"]
        assert "serve --methods MODULE" in outcome["summary"]
        run = await native.call("runs.get", {"run_id": outcome["run_id"]})
        assert (run["status"], run["error"]) == ("failed", outcome["summary"])
