"""The Unix socket: one message a line, from peers that are bare sockets. Standard input and output: `test_stdio`."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import EXIT_S, Daemon, running
from tests.fault.test_drain import DRAINING, exit_code
from tests.lines import is_there, unix_peer, unix_streams
from tests.peer import Refused, peer
from tests.trace import cursor_of, text, until_at_most
from tests.unit.storing import write_lock

KIB, MIB = 1024, 1024 * 1024
METHODS = ("--methods", "tests.methods_for_tests", "--methods", "tests.methods_that_print")
NOBODY = 65_534  # some user that is not root


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a Unix socket may be: its name must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running(tmp_path_factory.mktemp("lines") / "state", *METHODS, unix=f"{folder}/socket") as daemon,
    ):
        yield daemon


def at(daemon: Daemon) -> Path:
    """Its Unix socket."""
    return Path(str(daemon.settings["unix"]))


def call(id_: Any, method: str, params: Any = None) -> bytes:
    """A request as a line."""
    members = {} if params is None else {"params": params}
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, **members}).encode() + b"\n"


async def everything(reader: asyncio.StreamReader) -> list[Any]:
    """All lines until the stream ends, parsed."""
    return [json.loads(line) for line in (await asyncio.wait_for(reader.read(), 20)).splitlines()]


# Who a peer is.


async def test_a_peer_is_client_from_the_start_and_may_become_another_and_another_again(served: Daemon) -> None:
    async with unix_peer(at(served)) as client, peer(served) as other:
        run = await client.create()
        assert (await other.call("runs.get", {"run_id": run["id"]}))["id"] == run["id"], "it is client's"
        with pytest.raises(Refused) as refused:
            await client.call("test.host_only")
        assert refused.value.type == "forbidden"
        for token, role in (("host-token", "host"), ("auth-token", "client"), ("auth-token", "client")):
            member = "host_token" if role == "host" else "token"
            answer = await client.call("session.auth", {member: served.token(token)})
            assert (answer["ok"], answer["auth_enabled"], answer["role"]) == (True, True, role)
            if role == "host":
                assert await client.call("test.host_only") is None
        with pytest.raises(Refused) as refused:
            await client.call("session.auth", {"token": "wrong"})
        assert refused.value.type == "auth_failed"
        assert (await client.create())["id"]


async def test_whoever_becomes_another_attends_no_more_what_it_attended(start: StartDaemon, path: Path) -> None:
    daemon = start(unix=path)
    async with unix_peer(path) as client:
        await client.create()
        assert daemon.metrics()["attended_runs"] == 1
        await client.call("session.auth", {"token": daemon.token()})
        assert daemon.metrics()["attended_runs"] == 1, "the same: nothing changes"
        await client.call("session.auth", {"host_token": daemon.token("host-token")})
        assert daemon.metrics()["attended_runs"] == 0


async def test_whoever_becomes_another_is_told_no_more_of_what_it_followed(start: StartDaemon, path: Path) -> None:
    daemon = start(unix=path)
    async with unix_peer(path) as viewer, peer(daemon, "host-token") as host:
        run_id = (await host.create())["id"]
        await viewer.call("session.auth", {"host_token": daemon.token("host-token")})
        await viewer.call("runs.trace.subscribe", {"run_id": run_id})
        await viewer.call("runs.watch", {})
        await viewer.call("session.auth", {"token": daemon.token()})
        reason = "this connection acts as client now"
        assert await viewer.next("runs.trace.closed") == {"run_id": run_id, "reason": f"{reason}: subscribe again"}
        assert await viewer.next("runs.watch.reset") == {"reason": f"{reason}: watch again"}
        await host.record(run_id, text(0))
        mine = (await viewer.create())["id"]
        await viewer.call("runs.trace.subscribe", {"run_id": mine})
        assert json.loads(await viewer.next_frame())["params"]["run_id"] == mine, "and nothing of the other run"
        figures = daemon.metrics()
        assert (figures["subscriptions"], figures["watches"], figures["subscriptions_closed"]) == (1, 0, 1)


async def test_without_authentication_everyone_is_host_here_too(start: StartDaemon, path: Path) -> None:
    daemon = start(*METHODS, "--no-auth", unix=path)
    async with unix_peer(at(daemon)) as client:
        assert await client.call("test.host_only") is None
        answer = await client.call("session.auth", {"token": "any"})
        assert (answer["auth_enabled"], answer["role"]) == (False, "host")


AS_ANOTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid({user}); os.setuid({user})
peer = socket.socket(socket.AF_UNIX)
try:
    peer.connect({path!r})
except PermissionError:
    sys.exit(77)
try:
    peer.sendall({call!r})
    peer.shutdown(socket.SHUT_WR)
except OSError:
    pass
while data := peer.recv(65536):
    sys.stdout.buffer.write(data)
"""


def as_another(script: str) -> subprocess.CompletedProcess[bytes]:
    """Runs it, with the rights to become somebody else."""
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)


def let_everyone_in(path: Path) -> None:
    """As a careless operator would."""
    path.chmod(0o777)


def mode(path: Path) -> int:
    """Who may do what with a file."""
    return path.stat().st_mode & 0o777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_another_user_does_not_even_reach_the_socket_and_is_refused_where_it_does(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path)
    let_everyone_in(path.parent)
    assert mode(path) == 0o600
    script = AS_ANOTHER_USER.format(user=NOBODY, path=os.fspath(path), call=call(1, "server.ping"))
    assert (await asyncio.to_thread(as_another, script)).returncode == 77
    let_everyone_in(path)
    done = await asyncio.to_thread(as_another, script)
    assert done.returncode == 0
    (said,) = map(json.loads, done.stdout.splitlines())
    reason = f"this socket is for user 0 alone, not for user {NOBODY}"
    assert said == {"jsonrpc": "2.0", "method": "server.closing", "params": {"code": 1008, "reason": reason}}
    figures = daemon.metrics()
    assert (figures["unix_peers_refused"], figures["requests"]) == (1, 0)
    await until_at_most(daemon, "connections", 1)  # the one that asks
    assert reason in daemon.log


# Lines.


async def test_lines_end_with_lf_or_crlf_empty_ones_are_passed_over_and_the_last_needs_no_end(served: Daemon) -> None:
    ping = call("p", "server.ping").strip()
    async with unix_streams(at(served)) as (reader, writer):
        writer.write(b"\n\r\n \t\n" + ping + b"\r\n\n" + ping + b"\n" + ping)
        writer.write_eof()
        answers = await everything(reader)
        assert [answer["id"] for answer in answers] == ["p", "p", "p"]
        assert all(answer["result"]["now_ms"] for answer in answers)


NO_JSON = [
    b"{]",
    b'{"jsonrpc":"2.0","id":1,"method":"server.ping","params":{"x":"\xff"}}',
    b"\xff",
    b"nul",
    b"\0",
    b"\f",  # white space to Python, not to JSON
    b"\r{",
]


@pytest.mark.parametrize("line", NO_JSON)
async def test_what_is_no_json_or_no_utf8_is_answered_with_a_parse_error_and_the_connection_lives(
    line: bytes, served: Daemon
) -> None:
    async with unix_peer(at(served)) as client:
        refused = await client.raw(line)
        assert (refused["id"], refused["error"]["code"]) == (None, -32700)
        assert (await client.call("server.ping"))["now_ms"]


async def test_a_result_with_line_breaks_of_its_own_is_still_one_line(served: Daemon) -> None:
    event = '{"type":"x",\n\t"text" : "a\\nb\\u2028\u2028"}'
    async with unix_peer(at(served)) as client, peer(served) as other:
        run_id = (await other.create())["id"]
        params = f'{{"run_id":"{run_id}","events":[{event}]}}'
        answer = await other.raw(f'{{"jsonrpc":"2.0","id":"r","method":"runs.record","params":{params}}}')
        assert answer["result"]["cursor"] == 1
        page = await client.call("runs.events", {"run_id": run_id})
        assert page["events"][0]["event"] == json.loads(event)
        indented = await client.call("test.indented")
        assert indented == {"members": [1, 2]}


async def test_a_line_of_message_bytes_is_taken_and_one_byte_more_is_announced_and_ends_the_connection(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path, message_bytes=100 * KIB, close_s=60)
    ping = call("p", "server.ping").strip()
    longest = ping + b" " * (100 * KIB - len(ping))
    async with unix_streams(at(daemon)) as (reader, writer):
        writer.write(longest + b"\n" + longest + b" \n" + ping + b"\n")
        answer, error, closing = await everything(reader)
    assert answer["result"]["now_ms"]
    data = {"type": "limit_exceeded", "limit": "message_bytes", "value": 100 * KIB + 1, "maximum": 100 * KIB}
    assert (error["id"], error["error"]["code"], error["error"]["data"]) == (None, -32012, data)
    assert closing["params"] == {"code": 1009, "reason": "line over message_bytes (102400)"}
    await until_at_most(daemon, "connections", 1)  # the one that asks
    assert daemon.metrics()["protocol_violations"] == 1


async def test_whoever_goes_on_with_a_line_that_is_too_long_still_gets_the_reason(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path, message_bytes=100 * KIB)
    async with unix_streams(at(daemon)) as (reader, writer):
        for _ in range(100):
            writer.write(b"x" * 100 * KIB)
            await writer.drain()
        writer.write_eof()
        error, closing = await everything(reader)
    assert error["error"]["data"]["limit"] == "message_bytes"
    assert closing["params"]["code"] == 1009


async def test_ten_megabytes_go_each_way(served: Daemon) -> None:
    size = 10 * MIB
    async with unix_peer(at(served)) as client:
        assert len(await client.call("test.bytes", {"size": size})) == size - 2
        assert (await client.call("server.ping", {"pad": "x" * size}))["now_ms"]


async def test_a_batch_is_a_line_and_its_answer_is_one(served: Daemon) -> None:
    async with unix_peer(at(served)) as client:
        calls = [json.loads(call(f"b{n}", "subtract", [n, 1])) for n in range(64)]
        answers = await client.raw(json.dumps(calls))
        assert {answer["id"]: answer["result"] for answer in answers} == {f"b{n}": n - 1 for n in range(64)}


# The live trace.


async def test_a_trace_is_live_over_a_unix_socket_the_very_bytes_that_a_websocket_gets(served: Daemon) -> None:
    async with unix_peer(at(served)) as viewer, peer(served) as other, unix_peer(at(served)) as owner:
        run_id = (await owner.create())["id"]
        for watching in (viewer, other):
            await watching.call("runs.trace.subscribe", {"run_id": run_id})
        await owner.record(run_id, *(text(n) for n in range(500)))
        await owner.record(run_id, {"type": "agent_end", "text": "done"})
        frames = [[await watching.next_frame() for _ in range(503)] for watching in (viewer, other)]
        assert frames[0] == frames[1]
        assert [cursor_of(frame) for frame in frames[0]] == [*range(502), 501], "started, the events, ended"


# Limits of a connection.


async def test_64_requests_are_under_way_and_the_65th_is_not_read_until_one_is_answered(served: Daemon) -> None:
    async with unix_peer(at(served)) as client, peer(served) as other:
        requests = served.metrics()["requests"]
        held = [client.start("test.hold", {"name": "64"}) for _ in range(64)]
        ping = client.start("server.ping")
        await served.until("requests", requests + 64)
        assert served.metrics()["requests_in_flight"] == 64
        assert (await other.call("server.ping"))["now_ms"]
        assert served.metrics()["requests"] == requests + 65, "the other's; not the 65th"
        assert not ping.done()
        await other.call("test.release", {"name": "64"})
        assert await asyncio.gather(*held) == ["64"] * 64
        assert (await ping)["now_ms"]


async def test_a_peer_that_does_not_read_is_aborted_when_the_time_for_a_write_is_over(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(*METHODS, unix=path, write_s=0.5)
    async with unix_streams(at(daemon)) as (_, writer), unix_peer(at(daemon)) as other:
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # of a socket, so a transport that reads
        writer.write(call(1, "test.bytes", {"size": 15 * MIB}))
        await daemon.until("write_timeouts", 1)
        await until_at_most(daemon, "connections", 2)  # the other, and the one that asks
        assert daemon.metrics()["outbox_bytes"] == 0
        assert (await other.call("server.ping"))["now_ms"]
    assert "aborted: the peer has not read for write_s" in daemon.log


async def test_a_flood_of_empty_lines_keeps_nobody_waiting(served: Daemon) -> None:
    async with unix_streams(at(served)) as (reader, writer), unix_peer(at(served)) as other:
        writer.write(b"\n" * MIB + call("last", "server.ping"))
        writer.write_eof()
        assert (await other.call("server.ping"))["now_ms"]
        (answer,) = await everything(reader)
        assert answer["id"] == "last"


# Ends.


@pytest.mark.parametrize("method", ["test.hold", "test.wait"])
async def test_a_peer_that_sends_no_more_gets_all_answers_and_then_the_end_and_no_line_beside_them(
    method: str, served: Daemon
) -> None:
    calls = 300
    async with unix_streams(at(served)) as (reader, writer), peer(served) as other:
        requests = served.metrics()["requests"]
        writer.write(call("held", method, {"name": method}))
        writer.write(b"".join(call(n, "test.bytes", {"size": 2 * KIB}) for n in range(calls)))
        writer.write_eof()
        answers = [json.loads(await reader.readline()) for _ in range(calls)]
        assert [answer["id"] for answer in answers] == list(range(calls))
        assert served.metrics()["requests"] == requests + calls + 1
        await other.call("test.release", {"name": method})
        (held,) = await everything(reader)
        assert (held["id"], held["result"]) == ("held", method)


async def test_a_subscription_does_not_keep_a_peer_that_sends_no_more(served: Daemon) -> None:
    async with unix_streams(at(served)) as (reader, writer), peer(served) as owner:
        run_id = (await owner.create())["id"]
        writer.write(call(1, "runs.trace.subscribe", {"run_id": run_id}))
        writer.write_eof()
        assert (await everything(reader))[0]["id"] == 1
        await until_at_most(served, "subscriptions", 0)


async def test_a_peer_that_is_gone_while_its_request_waits_is_noticed_at_once(served: Daemon) -> None:
    async with unix_streams(at(served)) as (_, writer):
        writer.write(call(1, "test.wait", {"name": "never"}))
        await served.until("requests_in_flight", 1)
    await until_at_most(served, "requests_in_flight", 0)
    await until_at_most(served, "connections", 1)  # the one that asks


async def test_a_peer_that_goes_after_it_said_that_it_sends_no_more_is_noticed_too(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(*METHODS, unix=path, ping_s=0.1)
    async with unix_streams(at(daemon)) as (_, writer):
        writer.write(call(1, "test.wait", {"name": "never"}))
        writer.write_eof()
        await daemon.until("requests_in_flight", 1)
        for _ in range(5):
            assert daemon.metrics()["requests_in_flight"] == 1, "it waits, and is there"
    await until_at_most(daemon, "requests_in_flight", 0)
    await until_at_most(daemon, "connections", 1)


async def test_the_drain_tells_a_peer_refuses_new_work_and_closes_with_one_last_line(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path, drain_s=60)
    async with unix_streams(at(daemon)) as (reader, writer):
        with write_lock(daemon.state / "carserver.db"):
            writer.write(call(1, "runs.create", {"prompt": "waits"}))  # and the drain for it
            await daemon.until("storage_waiting_commands", 1)
            assert daemon.process is not None
            daemon.process.terminate()
            assert await reader.readline() == DRAINING + b"\n"
            assert not is_there(path), "nobody else is to come"
            writer.write(call(2, "runs.list") + call(3, "session.auth", {"token": daemon.token()}))
            answers = [json.loads(await reader.readline()) for _ in range(2)]
            assert answers[0]["error"]["data"]["type"] == "unavailable"
            assert answers[1]["result"]["ok"]
        created, closing = await everything(reader)
        assert (created["id"], created["result"]["prompt"]) == (1, "waits")
    assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0
    assert closing["params"] == {"code": 1012, "reason": "the daemon stops: reconnect"}


async def test_there_is_room_for_so_many_connections_and_one_more_is_told(start: StartDaemon, path: Path) -> None:
    daemon = start(unix=path, connections=2)
    async with unix_peer(at(daemon)) as first, unix_peer(at(daemon)) as second, unix_peer(at(daemon)) as third:
        for client in (first, second):
            assert (await client.call("server.ping"))["now_ms"]
        assert await third.closed() == (1013, "no room for another connection: connections (2)")
