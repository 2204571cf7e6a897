"""Tools that are hosted in lines, over a Unix socket or standard input and output."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.hosting import Host, begun, polled, until_ended
from tests.lines import line_peer, stdio_daemon, unix_peer, unix_streams
from tests.peer import Peer, peer

CONFIRMED = {"cancelled": True, "cancel": "confirmed"}


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Where a Unix socket may be: its name must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


def line_of(members: dict[str, Any]) -> bytes:
    """One message."""
    return json.dumps({"jsonrpc": "2.0", **members}).encode() + b"\n"


async def _serves(host: Host, caller: Peer) -> None:
    """It is asked, streams what a line must not break at, is told to stop, and answers."""
    await host.register("tail")
    hard = "a\nb\u2028\u0000c"
    handle, asked = await begun(caller, host, parameters={"text": hard})
    assert asked.params["parameters"] == {"text": hard}
    for _ in range(500):
        await asked.text(hard)
    await asked.answer({"text": hard})
    chunks, answer = await until_ended(caller, handle)
    assert [chunk.get("text") for chunk in chunks] == [hard] * 500 + [None]
    assert answer["result"] == {"text": hard}
    handle, asked = await begun(caller, host)
    cancelled = caller.start("tools.cancel", {"handle": handle, "wait_ms": 10_000})
    assert (await host.told_to_stop())["request_id"] == asked.id
    await asked.answer()
    assert await cancelled == CONFIRMED


async def test_a_tool_may_be_hosted_over_the_unix_socket(start: StartDaemon, socket_path: Path) -> None:
    daemon = start(unix=socket_path)
    async with peer(daemon) as caller, unix_peer(socket_path) as other:
        await _serves(Host(other), caller)
        handle, _ = await begun(caller, Host(other))
        await other.socket.wait_closed()
        assert (await until_ended(caller, handle))[1]["error"] == "the host's connection ended"


async def test_a_tool_may_be_hosted_over_standard_input_and_output(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state") as daemon:
        parent = line_peer(daemon.stdout, daemon.stdin)
        async with peer(await daemon.ready()) as caller:
            await _serves(Host(parent), caller)


async def test_a_host_that_is_somebody_else_now_hosts_nothing_any_more(start: StartDaemon, socket_path: Path) -> None:
    daemon = start(unix=socket_path)
    now = "this connection acts as host now"
    async with peer(daemon) as caller, unix_peer(socket_path) as other:
        host = Host(other)
        await host.register("tail")
        handle, asked = await begun(caller, host)
        await asked.text("one")
        await other.call("session.auth", {"host_token": daemon.token("host-token")})
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "text", "text": "one"}, {"kind": "error", "message": now}]
        assert answer["status"] == "failed"
        assert (await host.told_to_stop())["reason"] == now
        assert (await caller.call("tools.list"))["count"] == 0
        await asked.text("late")
        await asked.answer("late")
        await other.call("server.ping")
        figures = await asyncio.to_thread(daemon.metrics)
        assert (figures["stray_chunks"], figures["stray_replies"]) == (1, 1)
        await _serves(host, caller)


async def test_a_call_whose_host_has_gone_before_it_was_durable_fails(start: StartDaemon, socket_path: Path) -> None:
    daemon = start(unix=socket_path)
    async with peer(daemon) as caller, unix_streams(socket_path) as (reader, writer):
        register = {"id": 1, "method": "tools.register", "params": [{"name": "a"}]}
        invoke = {"id": 2, "method": "tools.invoke", "params": {"tool": "a", "idempotency_key": "k"}}
        become = {"id": 3, "method": "session.auth", "params": {"host_token": daemon.token("host-token")}}
        writer.write(b"".join(map(line_of, (register, invoke, become))))
        handle = ""
        while not handle:
            message = json.loads(await reader.readline())
            assert message.get("method") != "tools.execute"
            handle = message["result"]["handle"] if message.get("id") == 2 else ""
        chunks, answer = await until_ended(caller, handle)
        assert [chunk["kind"] for chunk in chunks] == ["error"]
        assert answer["status"] == "failed"
        assert answer["error"].startswith("cannot start: ")
        assert answer["error"].endswith("its host's connection has ended")


async def test_a_host_in_lines_that_sends_no_more_hosts_nothing_any_more(start: StartDaemon, socket_path: Path) -> None:
    daemon = start(unix=socket_path)
    async with peer(daemon) as caller, unix_streams(socket_path) as (reader, writer):
        register = {"id": 1, "method": "tools.register", "params": [{"name": "a"}]}
        call = {"id": 2, "method": "tools.call", "params": {"tool": "a"}}
        writer.write(line_of(register) + line_of(call))
        while json.loads(await reader.readline()).get("method") != "tools.execute":
            pass
        handle = (await caller.call("tools.invoke", {"tool": "a"}))["handle"]
        writer.write_eof()
        answer = await polled(caller, handle, wait_ms=20_000)
        assert (answer["status"], answer.get("error")) == ("failed", "the host's connection ended")
        said = [json.loads(line) for line in (await reader.read()).splitlines()]
        assert said[-1]["result"]["error"] == "the host's connection ended", "its own call is answered"


async def test_what_a_host_in_lines_says_before_it_sends_no_more_is_heard(
    start: StartDaemon, socket_path: Path
) -> None:
    daemon = start(unix=socket_path)
    async with peer(daemon) as caller, unix_streams(socket_path) as (reader, writer):
        writer.write(line_of({"id": 1, "method": "tools.register", "params": [{"name": "a"}]}))
        await reader.readline()
        handles = [(await caller.call("tools.invoke", {"tool": "a"}))["handle"] for _ in range(300)]
        ids = [json.loads(await reader.readline())["id"] for _ in handles]
        for id_ in ids:
            writer.write(line_of({"id": id_, "result": id_}))
        writer.write_eof()
        assert [(await until_ended(caller, handle))[1].get("result") for handle in handles] == ids
