"""How a connection begins to speak the CAR dialect, and what of the tools is said otherwise there."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from carserver import __version__
from tests.carframes import accepted, misfits, requests
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, until_ended
from tests.openrpc import check_references
from tests.peer import Peer, Refused, peer

OPENING = ("session.auth", "server.", "capabilities.", "tools.register", "tools.list", "tools.unregister")
SUBSCRIBES = ("tools.stream.subscribe", "tools.cancel")
OURS = ["runs.cancel.v1", "runs.resume.v1"]


async def shaken(caller: Peer, version: int = 3) -> None:
    """Speaks the dialect from now on."""
    await caller.call("server.handshake", {"protocol_version": version})


async def refused(caller: Peer, method: str, params: Any = None) -> dict[str, Any]:
    with pytest.raises(Refused) as caught:
        await caller.call(method, params)
    return caught.value.error


async def source_of(caller: Peer, name: str) -> Any:
    """What a tool is listed to come from."""
    return next(tool["source"] for tool in (await caller.call("tools.list"))["tools"] if tool["name"] == name)


async def test_what_the_client_sent_is_answered_as_what_it_took(daemon: Daemon) -> None:
    token = daemon.token()
    async with peer(daemon, None) as caller:
        for request in requests():
            if not request["method"].startswith(OPENING + SUBSCRIBES):
                continue
            params = {"token": token} if request["method"] == "session.auth" else request["params"]
            answer = await caller.raw(json.dumps({**request, "params": params}))
            assert "result" in answer, (request, answer)
            assert (type(answer["id"]), answer["id"]) == (int, request["id"])
            taken = accepted(request)
            if request["method"] == "server.schema":
                answer["result"]["schema"]["coverage"] = {}  # what is in it is each daemon's own
            assert taken is None or misfits(answer["result"], taken) == [], request
            assert request["method"] != "tools.list" or answer["result"] == taken


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_a_served_version_is_echoed_as_the_same_integer(served: Daemon, version: int) -> None:
    async with peer(served) as caller:
        params = {"protocol_version": version, "client_version": "0.31.0"}
        assert await caller.call("server.handshake", params) == {
            "protocol_version": version,
            "server_version": __version__,
            "client_protocol_version": version,
            "client_version": "0.31.0",
            "negotiated_capabilities": [],
        }
        assert (await caller.call("server.handshake", {"protocol_version": version}))["client_version"] is None


async def test_a_version_that_is_not_served_is_refused_by_its_code_with_those_that_are(served: Daemon) -> None:
    async with peer(served) as caller:
        for version in (0, 4, 2**53):
            error = await refused(caller, "server.handshake", {"protocol_version": version})
            assert error["code"] == -32006
            assert error["data"] == {"type": "version_mismatch", "given": version, "supported": [1, 2, 3]}
        assert await caller.call("runs.list", {})
        await shaken(caller)


async def test_a_required_capability_that_there_is_not_is_refused_by_its_code(served: Daemon) -> None:
    async with peer(served) as caller:
        params = {"protocol_version": 3, "required_capabilities": ["runs.fly.v1", OURS[0], "runs.swim.v1"]}
        error = await refused(caller, "server.handshake", params)
        assert error["code"] == -32008
        assert error["data"] == {
            "type": "capability_missing",
            "missing": ["runs.fly.v1", "runs.swim.v1"],
            "available": OURS,
        }
        assert "'runs.fly.v1'" in error["message"]


async def test_what_is_negotiated_are_ours_that_were_named_in_that_order_and_once(served: Daemon) -> None:
    async with peer(served) as caller:

        async def negotiated(**named: Any) -> Any:
            return (await caller.call("server.handshake", {"protocol_version": 3, **named}))["negotiated_capabilities"]

        first, second = OURS
        assert await negotiated() == []
        assert await negotiated(required_capabilities=None, optional_capabilities=None) == []
        assert await negotiated(optional_capabilities=["no.such.v1", second, first]) == [second, first]
        assert await negotiated(required_capabilities=[second], optional_capabilities=OURS) == [second, first]
        assert await negotiated(required_capabilities=[first, first]) == [first]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "invalid_params"),
    ({"protocol_version": "3"}, "invalid_params"),
    ({"protocol_version": True}, "invalid_params"),
    ({"protocol_version": 3.5}, "invalid_params"),
    ({"protocol_version": 3, "client_version": "1" * 257}, "limit_exceeded"),
    ({"protocol_version": 3, "required_capabilities": ["x"] * 65}, "invalid_params"),
    ({"protocol_version": 3, "optional_capabilities": ["x" * 257]}, "limit_exceeded"),
    ({"protocol_version": 3, "optional_capabilities": ["\x1b[2J"]}, "invalid_params"),
    ({"protocol_version": 4}, "version_mismatch"),
    ({"protocol_version": 3, "required_capabilities": ["x"]}, "capability_missing"),
]


async def test_a_handshake_that_is_refused_leaves_the_connection_as_it_was(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        await Host(caller).register("a")
        for source in ("client", "user_defined"):
            for params, type_ in WRONG:
                assert (await refused(caller, "server.handshake", params))["data"]["type"] == type_
                assert await source_of(caller, "a") == source
            await shaken(caller)


async def test_a_handshake_comes_after_authentication(served: Daemon) -> None:
    async with peer(served, None) as caller:
        error = await refused(caller, "server.handshake", {"protocol_version": 3})
        assert error["data"] == {"type": "auth_required"}
        assert (await caller.closed())[0] == 1008


async def test_the_dialect_is_its_connections_alone_and_tools_are_everyones(start: StartDaemon, tmp_path: Path) -> None:
    tools = tmp_path / "tools.toml"
    tools.write_text('[tools.says]\ncommand = ["true"]\n')
    daemon = start("--tools", str(tools))
    async with peer(daemon) as native, peer(daemon) as dialect:
        await shaken(dialect)
        assert await dialect.call("tools.register", [{"name": "hers", "parameters": None, "idempotent": None}]) == 1
        assert await native.call("tools.register", [{"name": "mine", "idempotent": True}]) == 1
        here, there = await native.call("tools.list"), await dialect.call("tools.list")
        assert {tool["name"]: tool["source"] for tool in here["tools"]} == {
            "hers": "client",
            "mine": "client",
            "says": "process",
        }
        assert {tool["name"]: tool["source"] for tool in there["tools"]} == {
            "hers": "user_defined",
            "mine": "user_defined",
            "says": "process",
        }
        assert [{**tool, "source": ""} for tool in here["tools"]] == [{**tool, "source": ""} for tool in there["tools"]]
        error = await refused(native, "tools.register", [{"name": "x", "parameters": None}])
        assert error["data"]["type"] == "invalid_params"
        assert await dialect.call("tools.unregister", {"name": "hers"}) == {"unregistered": "hers", "removed": 1}
        assert len((await dialect.call("tools.list"))["tools"]) == 2


async def test_a_whole_tool_schema_is_taken_and_the_native_rules_hold_of_it(daemon: Daemon) -> None:
    whole = {
        "name": "deploy",
        "description": "Deploys.",
        "parameters": {"type": "object", "required": ["env"]},
        "returns": {"type": "object"},
        "idempotent": True,
        "cache_ttl_secs": 60,
        "rate_limit": {"max_calls": 5, "interval_secs": 60.0},
        "source": "builtin",
    }
    empty = dict.fromkeys(whole) | {"name": "empty"}
    async with peer(daemon) as caller, peer(daemon) as other:
        await shaken(caller)
        host = Host(caller)
        assert await host.register(whole, empty) == 2
        assert (await caller.call("tools.list"))["tools"] == [
            {key: whole[key] for key in ("name", "description", "parameters", "returns", "idempotent")}
            | {"source": "user_defined"},
            {"name": "empty", "source": "user_defined", "description": "", "parameters": {}, "idempotent": False},
        ]
        assert (await refused(other, "tools.invoke", {"tool": "deploy"}))["data"]["path"] == "parameters.env"
        handle = (await other.call("tools.invoke", {"tool": "deploy", "parameters": {"env": "x"}}))["handle"]
        await (await host.asked()).answer("done")
        assert (await until_ended(other, handle))[1]["result"] == "done"
        for wrong in (
            {"name": ""},
            {"name": None},
            {"name": "a", "parameters": 3},
            {},
            {"name": "empty", "returns": "x"},
        ):
            assert (await refused(caller, "tools.register", [{"name": "b"}, wrong]))["code"] == -32602
        assert (await refused(other, "tools.register", [{"name": "empty"}]))["data"]["reason"] == "name_taken"
        assert (await refused(caller, "tools.register", [{"name": "c"}] * 1_001))["data"]["limit"] == "hosted_tools"
        assert (await caller.call("tools.list"))["count"] == 2


async def test_two_agents_have_tools_of_the_same_name_and_each_gets_its_own(daemon: Daemon) -> None:
    async with peer(daemon) as one, peer(daemon) as two, peer(daemon) as native:
        hosts = Host(one), Host(two)
        for host in hosts:
            await shaken(host.peer)
            assert await host.register("finish") == 1
        for caller, asked in ((one, hosts[0]), (two, hosts[1]), (native, hosts[0])):
            handle = (await caller.call("tools.invoke", {"tool": "finish"}))["handle"]
            await (await asked.asked()).answer("done")
            assert (await until_ended(caller, handle))[1]["result"] == "done"
        assert (await native.call("tools.list"))["count"] == 1
        assert await one.call("tools.unregister", {"name": "finish"}) == {"unregistered": "finish", "removed": 1}
        handle = (await native.call("tools.invoke", {"tool": "finish"}))["handle"]
        await (await hosts[1].asked()).answer("done")
        assert (await until_ended(native, handle))[1]["result"] == "done"


async def test_the_schema_is_complete_in_itself_and_its_digest_is_that_of_its_bytes(served: Daemon) -> None:
    async with peer(served) as caller:
        await shaken(caller)
        await caller.socket.send('{"jsonrpc":"2.0","id":"schema","method":"server.schema","params":{}}')
        frame = await caller.next_frame()
        answer = json.loads(frame)["result"]
        document = await caller.call("rpc.discover")
    assert (answer["digest_algorithm"], answer["car_version"]) == ("sha256", __version__)
    begin = frame.index(b'{"schema":') + len(b'{"schema":')
    schema = frame[begin : frame.rindex(b',"digest":')]
    assert hashlib.sha256(schema).hexdigest() == answer["digest"]
    assert answer["schema"]["x-car"] == document["x-car"]
    check_references(answer["schema"])
    for kind, named in answer["schema"]["components"].items():
        assert named.items() <= document["components"][kind].items()
    assert len(answer["schema"]["components"]["schemas"]) < len(document["components"]["schemas"])


@pytest.mark.parametrize(("token", "role"), [("auth-token", "client"), ("host-token", "host")])
async def test_the_capabilities_are_what_this_connection_may_call(served: Daemon, token: str, role: str) -> None:
    async with peer(served, token) as caller:
        await shaken(caller)
        answer = await caller.call("capabilities.list", {})
        document = await caller.call("rpc.discover")
    everything = {method["name"]: method["x-role"] for method in document["methods"]}
    everything |= {method["name"]: method["x-role"] for method in document["x-car"]}
    listed = {entry["method"]: entry["role"] for entry in answer["methods"]}
    assert answer["caller_role"] == role
    assert answer["count"] == len(answer["methods"]) == len(listed)
    assert list(listed) == sorted(listed)
    assert listed == {name: needs for name, needs in everything.items() if role == "host" or needs != "host"}


async def test_an_old_client_that_makes_no_handshake_finds_what_is_in_the_dialect_alone(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        await Host(caller).register("a")
        assert (await caller.call("server.schema"))["digest_algorithm"] == "sha256"
        assert (await caller.call("capabilities.list"))["caller_role"] == "client"
        assert await source_of(caller, "a") == "client"


async def test_what_there_is_not_is_refused_with_what_there_is(served: Daemon) -> None:
    async with peer(served) as caller:
        native = await refused(caller, "agents.register_basics", {})
        assert native["code"] == -32601
        assert native["data"] == {"type": "method_not_found", "hint": native["message"].partition("; ")[2]}
        assert "rpc.discover lists all" in native["data"]["hint"]
        await shaken(caller)
        answer = await caller.raw('{"id":5,"jsonrpc":"2.0","method":"agents.register_basics","params":null}')
        assert (answer["id"], answer["error"]["code"]) == (5, -32601)
        assert "tools.*" in answer["error"]["data"]["hint"]
        assert "capabilities.list lists all" in answer["error"]["data"]["hint"]
        assert "capabilities.list" in (await refused(caller, "capabilities.lst"))["data"]["hint"]
