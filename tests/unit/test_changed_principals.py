"""A connection that comes to act as somebody else while what it asked for before is under way."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import CLIENT, Principal
from tests.rig import Rig, rigged


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[tuple[Rig, asyncio.Runner]]:
    with rigged(tmp_path) as (made, runner):
        made.session.dialect = "car"
        yield made, runner


def ask(one: Rig, runner: asyncio.Runner, method: str, params: dict[str, Any], *, changes: bool) -> dict[str, Any]:
    async def asked() -> dict[str, Any]:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        one.daemon.front.dispatcher.receive(one.session, json.dumps(message).encode())
        if changes:
            assert one.connection.tasks, "it waits"
            one.session.authenticate(Principal("agent", "other"))
        while one.connection.tasks:
            await asyncio.wait(one.connection.tasks)
        reply: dict[str, Any] = json.loads(one.outbox.take(1))
        return reply

    return runner.run(asked())


def test_a_run_that_was_started_before_is_not_the_new_ones(rig: tuple[Rig, asyncio.Runner]) -> None:
    one, runner = rig
    assert "result" in ask(one, runner, "runs.start", {"intent": "i", "agent_name": "n"}, changes=True)
    assert one.session.current_run is None


def test_a_run_that_was_resumed_before_is_not_attended_alone_by_the_new_one(rig: tuple[Rig, asyncio.Runner]) -> None:
    one, runner = rig
    run = ask(one, runner, "runs.start", {"intent": "i", "agent_name": "n"}, changes=False)["result"]["run_id"]
    assert one.session.current_run == run
    assert "result" in ask(one, runner, "runs.resume", {"run_id": run}, changes=True)
    assert one.session.current_run is None


@pytest.mark.parametrize("method", ["runs.subscribe", "runs.trace.subscribe"])
def test_the_new_one_does_not_follow_what_was_to_be_followed_before(
    rig: tuple[Rig, asyncio.Runner], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, runner = rig
    run = ask(one, runner, "runs.start", {"intent": "i", "agent_name": "n"}, changes=False)["result"]["run_id"]
    monkeypatch.setattr(one.daemon.runs.hub, "find", lambda _: None)  # it has to be read
    reply = ask(one, runner, method, {"run_id": run}, changes=True)
    assert reply["error"]["data"]["type"] == "not_found"
    assert one.session.subscriptions == {}
    one.session.authenticate(CLIENT)
    assert "result" in ask(one, runner, method, {"run_id": run}, changes=False)
    assert list(one.session.subscriptions) == [run]
