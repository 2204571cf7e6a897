"""One method table, three ways to it: every method's documented example is answered the same over each of them."""

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from carserver.core.principals import CLIENT, HOST, Principal
from carserver.methods.runs import RUN, keyed_run_id
from carserver.rpc.method import Method
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.lines import line_peer, stdio_daemon, unix_peer
from tests.peer import Peer, peer
from tests.reference import AUTH_TOKEN, settled, table

HOST_TOKEN = "HOST_TOKEN"
RANDOM = re.compile(r"(?<!run-)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=out-)[0-9a-f]{10}|\b[0-9a-f]{32,}\b")

Played = dict[str, tuple[Any, list[Any]]]
"""By method: what its example was answered, and what was pushed until then."""


def methods() -> list[Method]:
    """All but `session.auth`, which has a test of its own."""
    return [entry for entry in table().all().values() if not entry.dialect and entry.name != "session.auth"]


def one_of_its_own(entry: Method, principal: Principal) -> tuple[list[Any], Any]:
    """The calls before an example and its params: with a run that only this example has, and that `principal` owns."""
    params = None if entry.example.params is msgspec.UNSET else entry.example.params
    written = json.dumps([entry.example.before, params])
    written = written.replace(RUN, keyed_run_id(principal, entry.name))
    before, params = json.loads(written.replace('"idempotency_key": "example"', f'"idempotency_key": "{entry.name}"'))
    return before, params


async def play(caller: Peer, principal: Principal) -> Played:
    """Runs all examples."""
    played: Played = {}
    for entry in methods():
        before, params = one_of_its_own(entry, principal)
        for method, given in before:
            await caller.request({"method": method, "params": given})
        members = {} if params is None else {"params": params}
        asked = asyncio.create_task(caller.request({"method": entry.name, **members}))
        executed = [await hosted(caller)] if entry.name == "tools.call" else []
        answer = await asked
        del answer["id"]
        await caller.call("server.ping")  # what was pushed before comes before its answer
        pushed = executed + [json.loads(caller.pushed.get_nowait()) for _ in range(caller.pushed.qsize())]
        # How many changes of a run become one `runs.changed` depends on who is quicker.
        told = [comparable(message) for message in pushed if message["method"] != "runs.changed"]
        played[entry.name] = (words_of(answer) if entry.name == "server.status" else comparable(answer)), told
    return played


async def hosted(caller: Peer) -> Any:
    """Runs a tool that the caller hosts itself: what it was asked."""
    asked = json.loads(await caller.next_frame())
    while asked["method"] != "tools.execute":
        asked = json.loads(await caller.next_frame())
    await caller.socket.send(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": None}))
    return asked


def comparable(message: Any) -> Any:
    """Without times and random ids; the place where a list goes on has a time in it."""
    return json.loads(RANDOM.sub("random", json.dumps(settled(message))))


def words_of(value: Any) -> Any:
    """Without its figures, which are of this moment."""
    if isinstance(value, dict):
        return {name: words_of(member) for name, member in value.items()}
    return type(value).__name__


def a_daemon(start: StartDaemon, name: str, **settings: object) -> Daemon:
    """One whose tokens the examples know."""
    return start(name=name, auth_token=AUTH_TOKEN, host_token=HOST_TOKEN, **settings)


def check_worth(played: Played) -> None:
    """Most of the examples did what they show, and some pushed something."""
    assert len(played) == len(methods())
    refused = [name for name, (answer, _) in played.items() if "error" in answer]
    assert len(refused) <= len(played) / 4, refused
    assert any(pushed for _, pushed in played.values())


async def test_every_method_answers_the_host_the_same_over_a_websocket_a_unix_socket_and_the_standard_streams(
    start: StartDaemon, tmp_path: Path
) -> None:
    async with peer(a_daemon(start, "websocket"), HOST_TOKEN) as caller:
        over_websocket = await play(caller, HOST)
    check_worth(over_websocket)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        a_daemon(start, "unix", unix=path)
        async with unix_peer(path) as caller:
            await caller.call("session.auth", {"host_token": HOST_TOKEN})
            assert await play(caller, HOST) == over_websocket

    async with stdio_daemon(tmp_path / "stdio", auth_token=AUTH_TOKEN, host_token=HOST_TOKEN) as daemon:
        assert await play(line_peer(daemon.stdout, daemon.stdin), HOST) == over_websocket


async def test_every_method_answers_a_client_the_same_over_a_websocket_and_a_unix_socket(start: StartDaemon) -> None:
    async with peer(a_daemon(start, "websocket"), AUTH_TOKEN) as caller:
        over_websocket = await play(caller, CLIENT)
    check_worth(over_websocket)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        a_daemon(start, "unix", unix=path)
        async with unix_peer(path) as caller:
            assert await play(caller, CLIENT) == over_websocket


async def test_session_auth_is_answered_the_same_over_each(start: StartDaemon, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = [{"host_token": HOST_TOKEN}, {"host_token": "wrong"}, {"host_token": HOST_TOKEN}, {}]

    async def answers(caller: Peer) -> list[Any]:
        given = [await caller.request({"method": "session.auth", "params": params}) for params in calls]
        return [comparable(answer | {"id": None}) for answer in given]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        async with peer(a_daemon(start, "both", unix=path, wrong_token_s=0.01), None) as caller:
            over_websocket = await answers(caller)
        assert over_websocket[0]["result"]["role"] == "host"
        async with unix_peer(path) as caller:
            assert await answers(caller) == over_websocket
    async with stdio_daemon(tmp_path / "stdio", host_token=HOST_TOKEN, wrong_token_s=0.01) as daemon:
        assert await answers(line_peer(daemon.stdout, daemon.stdin)) == over_websocket
