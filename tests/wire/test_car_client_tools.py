"""The real client and tools: it hosts them by name and by schema, and follows, polls and cancels what runs."""

from pathlib import Path
from typing import Any

import pytest

from tests.carclient import CarClient, car_client, needs_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Asked, Host, hosted
from tests.peer import peer
from tests.unit.proposing import action

pytestmark = needs_car

TOOLS = """\
[tools.count]
description = "Counts."
command = ["printf", "one\\\\ntwo\\\\n"]

[tools.sleep]
command = ["sleep", "600"]
"""
WHOLE: dict[str, Any] = {
    "name": "deploy",
    "description": "Deploys.",
    "parameters": {"type": "object", "required": ["env"], "properties": {"env": {"type": "string"}}},
    "returns": {"type": "object"},
    "idempotent": True,
}
IGNORED = {"timeoutMs": 5_000, "cache_ttl_secs": 60, "rate_limit": {"max_calls": 5, "interval_secs": 60.0}}
EMPTY = {"description": "", "parameters": {}, "idempotent": False}


@pytest.fixture
def daemon(start: StartDaemon, tmp_path: Path) -> Daemon:
    """It has a tools file."""
    file = tmp_path / "tools.toml"
    file.write_text(TOOLS)
    return start("--tools", str(file))


async def invoked(car: CarClient, host: Host, tool: str) -> tuple[str, Asked]:
    """A handle that the client has got, and the request that its host has."""
    handle: str = (await car.daemon_call("tools.invoke", {"tool": tool}))["handle"]
    return handle, await host.asked()


async def handed(car: CarClient, handle: str) -> list[dict[str, Any]]:
    """All chunks of a handle that its handler gets; all events are of it, and none is missing."""
    chunks: list[dict[str, Any]] = []
    while not chunks or chunks[-1]["kind"] not in ("done", "error"):
        event = (await car.notified()).params
        assert (event["handle"], event["sequence"]) == (handle, len(chunks))
        chunks.append(event["chunk"])
    return chunks


async def test_tools_are_hosted_by_name_and_by_schema_and_listed_with_where_they_come_from(daemon: Daemon) -> None:
    async with car_client(daemon) as car, peer(daemon) as native:
        assert await car.call("register_tool", "by name") is None
        assert await car.call("register_tool_schema", WHOLE | IGNORED) is None
        # A schema as `list_tools` gives it is taken back, its source too.
        assert await car.call("tools_register", [{"name": "a", "source": "user_defined"}, {"name": "b"}]) == 2
        whole = WHOLE | {"source": "user_defined"}
        entries = {"a": EMPTY, "b": EMPTY, "by name": EMPTY}
        listed = await car.call("list_tools")
        assert [tool["name"] for tool in listed] == ["a", "b", "by name", "count", "deploy", "sleep"]
        assert [tool for tool in listed if tool["source"] == "user_defined"] == [
            whole if name == "deploy" else {"name": name, "source": "user_defined", **entries[name]}
            for name in ("a", "b", "by name", "deploy")
        ]
        count = next(tool for tool in listed if tool["name"] == "count")
        assert (count["source"], count["description"]) == ("process", "Counts.")
        assert await car.call("tools_list", {}) == {"tools": listed, "count": 6}
        assert {tool["name"] for tool in (await native.call("tools.list"))["tools"]} == {
            tool["name"] for tool in listed
        }

        assert await car.call("unregister_tool", "by name") == 1
        assert await car.call("unregister_tool", "by name") == 0
        assert await car.call("unregister_tool", "count") == 0  # it is the daemon's
        assert await car.call("tools_unregister", {"name": "a"}) == {"unregistered": "a", "removed": 1}
        assert [tool["name"] for tool in await car.call("list_tools")] == ["b", "count", "deploy", "sleep"]


async def test_a_tool_is_called_by_whoever_speaks_the_native_words_once_the_client_is_ready(served: Daemon) -> None:
    async with car_client(served) as car, peer(served) as native:
        await car.call("register_tool_schema", WHOLE)
        order = {"tool": "deploy", "parameters": {"env": "prod"}}
        called = await native.call("tools.call", order)  # it serves no call before its first proposal
        assert (called["status"], "no handler registered" in called["error"]) == ("failed", True)
        assert (await car.call("submit_proposal", {"actions": []}))["results"] == []
        calling = native.start("tools.call", order)
        asked = await car.asked()
        assert (asked.call["tool"], asked.call["params"]) == ("deploy", {"env": "prod"})
        await asked.answers({"deployed": True})
        assert (await calling)["result"] == {"deployed": True}


async def test_a_handle_that_nobody_knows_is_none_and_false(served: Daemon) -> None:
    async with car_client(served) as car:
        for unknown in ("none", "0" * 32, ""):
            assert await car.call("tool_poll", unknown) is None
            assert await car.call("tool_cancel", unknown) is False
            assert await car.call("tools_poll", {"handle": unknown}) is None
            assert await car.call("tools_cancel", {"handle": unknown}) == {"cancelled": False}
            assert await car.call("tools_stream_subscribe", {"handle": unknown}) == {"subscribed": True}


async def test_what_a_native_host_streams_reaches_the_clients_handler_and_its_polls(served: Daemon) -> None:
    async with car_client(served) as car, hosted(served) as (_, host):
        await car.listen("tools.stream.event")
        handle, asked = await invoked(car, host, "tail")
        assert await car.call("tools_stream_subscribe", {"handle": handle}) == {"subscribed": True}
        await asked.text("one", "two")
        await asked.chunk({"kind": "progress", "fraction": 0.5, "message": "half"})
        await asked.chunk({"kind": "data", "data": {"row": 1}})
        await asked.answer({"lines": 2})
        chunks = await handed(car, handle)
        assert [chunk["kind"] for chunk in chunks] == ["text", "text", "progress", "data", "done"]
        assert ([chunk["text"] for chunk in chunks[:2]], chunks[-1]["result"]) == (["one", "two"], {"lines": 2})
        polled = await car.call("tool_poll", handle)
        assert polled["chunks"] == chunks
        assert (polled["status"], polled["result"], polled["tool"]) == ("succeeded", {"lines": 2}, "tail")
        assert (await car.call("tool_poll", handle))["chunks"] == []  # one more answer, and then it is forgotten
        assert await car.call("tool_poll", handle) is None


async def test_what_a_command_writes_reaches_the_clients_handler_and_a_cancel_ends_it(daemon: Daemon) -> None:
    async with car_client(daemon) as car:
        await car.listen("tools.stream.event")
        await car.call("tools_stream_subscribe", {})  # all of one's own, those to come too
        handle = (await car.daemon_call("tools.invoke", {"tool": "count"}))["handle"]
        *texts, done = await handed(car, handle)
        assert "".join(chunk["text"] for chunk in texts) == "one\ntwo\n"
        assert (done["kind"], done["result"]["exit_code"]) == ("done", 0)

        handle = (await car.daemon_call("tools.invoke", {"tool": "sleep"}))["handle"]
        assert await car.call("tool_cancel", handle) is True
        (chunk,) = await handed(car, handle)
        assert (chunk["kind"], "cancelled" in chunk["message"]) == ("error", True)
        assert await car.call("tool_cancel", handle) is True  # it is known, and is over
        cancelled = await car.call("tools_cancel", {"handle": handle, "wait_ms": 10_000})
        assert cancelled == {"cancelled": True, "cancel": "confirmed"}
        assert (await car.call("tool_poll", handle))["status"] == "cancelled"


async def test_a_client_that_has_not_registered_its_tool_again_does_not_get_another_agents(served: Daemon) -> None:
    async with car_client(served) as car, car_client(served) as other:
        for one in (car, other):
            await one.call("register_tool", "finish")
            assert (await one.call("submit_proposal", {"actions": []}))["results"] == []
            one.tools["finish"] = lambda parameters: parameters
        epoch = await car.call("connection_epoch")
        await car.call("close")  # as if the connection were lost between two turns of its agent
        await car.reconnected(epoch)
        finish = action("a", tool="finish", parameters={"answer": "of the one, not of the other"})
        (result,) = (await car.call("submit_proposal", {"actions": [finish]}))["results"]
        assert (result["status"], "'finish'" in result.get("error", "")) == ("failed", True)
