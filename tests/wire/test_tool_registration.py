"""`tools.register`, `tools.unregister`, `tools.list` over sockets, and what a tool's schema lets through."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, polled
from tests.peer import Peer, Refused, peer

SCHEMA = {"type": "object", "properties": {"files": {"items": {"required": ["name"]}}}, "required": ["files"]}


async def names(caller: Peer) -> list[str]:
    listed = await caller.call("tools.list")
    assert listed["count"] == len(listed["tools"])
    return [tool["name"] for tool in listed["tools"]]


async def refused(caller: Peer, method: str, params: Any) -> dict[str, Any]:
    with pytest.raises(Refused) as caught:
        await caller.call(method, params)
    data: dict[str, Any] = caught.value.data
    return data


async def test_tools_are_there_for_everyone_until_their_connection_ends(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        async with peer(daemon) as other:
            assert await Host(other).register("b", {"name": "a", "parameters": SCHEMA, "idempotent": True}) == 2
            assert (await caller.call("tools.list"))["tools"] == [
                {"name": "a", "source": "client", "description": "", "parameters": SCHEMA, "idempotent": True},
                {"name": "b", "source": "client", "description": "", "parameters": {}, "idempotent": False},
            ]
            assert await refused(caller, "tools.register", [{"name": "c"}, {"name": "b"}]) == {
                "type": "conflict",
                "reason": "name_taken",
                "path": "[1].name",
            }
            assert await names(caller) == ["a", "b"]
        assert await names(caller) == []  # its socket was closed by the daemon, and last of all
        assert await caller.call("tools.register", [{"name": "b"}]) == 1


async def test_what_was_invoked_goes_on_when_its_tool_is_unregistered_or_replaced(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("a")
        handle = (await caller.call("tools.invoke", {"tool": "a"}))["handle"]
        asked = await host.asked()
        await host.register({"name": "a", "parameters": SCHEMA})
        assert (await refused(caller, "tools.invoke", {"tool": "a"}))["path"] == "parameters.files"
        assert await other.call("tools.unregister", {"name": "a"}) == {"unregistered": "a", "removed": 1}
        assert await other.call("tools.unregister", {"name": "a"}) == {"unregistered": "a", "removed": 0}
        assert await refused(caller, "tools.invoke", {"tool": "a"}) == {"type": "not_found", "what": "tool"}
        await asked.answer("well")
        answer = await polled(caller, handle, wait_ms=10_000)
        assert (answer["status"], answer["result"]) == ("succeeded", "well")


async def test_somebody_else_cannot_unregister_a_tool(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        await Host(other).register("a")
        assert await caller.call("tools.unregister", {"name": "a"}) == {"unregistered": "a", "removed": 0}
        assert await names(caller) == ["a"]


async def test_arguments_are_checked_before_anything_runs_and_passed_on_as_they_came(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register({"name": "a", "parameters": SCHEMA})
        wrong = {"files": [{"name": "x"}, {"name": "y"}, {"name": "z"}, {"nome": "w"}]}
        assert await refused(caller, "tools.invoke", {"tool": "a", "parameters": wrong}) == {
            "type": "invalid_params",
            "path": "parameters.files[3].name",
        }
        assert (await refused(caller, "tools.invoke", {"tool": "a", "parameters": []}))["path"] == "parameters"
        await caller.socket.send(
            '{"jsonrpc": "2.0", "id": 77, "method": "tools.invoke", "params":'
            ' {"tool": "a", "parameters": {"files": [ ], "n": 1.50, "b": 123456789012345678901}}}'
        )
        frame = await other.next_frame()
        assert b'"parameters":{"files":[],"n":1.50,"b":123456789012345678901}' in frame


@pytest.mark.parametrize(
    ("params", "data"),
    [
        ({"name": "a"}, {"type": "invalid_params", "path": ""}),
        ([{"name": "a"}, {}], {"type": "invalid_params", "path": "[1]"}),
        ([{"name": "a"}, {"name": ""}], {"type": "invalid_params", "path": "[1].name"}),
        ([{"name": "a"}, {"name": "a"}], {"type": "invalid_params", "path": "[1].name"}),
        ([{"name": "a", "parameters": {"type": "x"}}], {"type": "invalid_params", "path": "[0].parameters.type"}),
        (
            [{"name": "a", "description": "x" * 65_536}],
            {"type": "limit_exceeded", "limit": "tool_bytes", "value": 65_618, "maximum": 65_536},
        ),
    ],
    ids=["no array", "no name", "an empty name", "a name twice", "no schema", "a large one"],
)
async def test_what_cannot_be_registered_is_said_and_nothing_is(
    daemon: Daemon, params: Any, data: dict[str, Any]
) -> None:
    async with peer(daemon) as caller:
        assert await refused(caller, "tools.register", params) == data
        assert await names(caller) == []


async def test_a_thousand_tools_of_one_connection_and_no_more(daemon: Daemon) -> None:
    tools = [{"name": f"t{number:04}", "description": "d" * 200, "parameters": SCHEMA} for number in range(1_000)]
    async with peer(daemon) as caller, peer(daemon) as other:
        assert await caller.call("tools.register", tools) == 1_000
        assert await names(other) == [tool["name"] for tool in tools]
        assert (await refused(caller, "tools.register", [{"name": "more"}]))["limit"] == "hosted_tools"
        assert (await refused(other, "tools.register", [*tools, {"name": "more"}]))["limit"] == "hosted_tools"
        assert await caller.call("tools.register", tools[:5]) == 5


async def test_the_tools_file_declares_tools_and_keeps_their_names(start: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "tools.toml"
    file.write_text('[tools.say]\ncommand = ["printf", "%s", "{text}"]\nparameters.properties.text.type = "string"\n')
    daemon = start("--tools", str(file))
    async with peer(daemon) as caller:
        assert await names(caller) == ["say"]
        assert (await refused(caller, "tools.register", [{"name": "say"}]))["reason"] == "name_taken"
        assert await caller.call("tools.unregister", {"name": "say"}) == {"unregistered": "say", "removed": 0}
        called = await caller.call("tools.call", {"tool": "say", "parameters": {"text": "a  b; c"}})
        assert called["status"] == "succeeded"
        chunks = (await polled(caller, called["handle"]))["chunks"]
        assert "".join(chunk["text"] for chunk in chunks if chunk["kind"] == "text") == "a  b; c"
        assert called["result"]["exit_code"] == 0
