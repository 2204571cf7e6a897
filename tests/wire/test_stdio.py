"""`serve --stdio`: the parent is host, one message a line, nothing but frames on standard output."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.fault.test_drain import DRAINING
from tests.lines import MIB, StdioDaemon, environment, line_peer, stdio_command, stdio_daemon, unix_peer
from tests.methods_that_print import NOISE
from tests.peer import Refused, peer
from tests.trace import cursor_of, text

KIB = 1024
METHODS = ("--methods", "tests.methods_for_tests", "--methods", "tests.methods_that_print")
END = [
    json.loads(DRAINING),
    {
        "jsonrpc": "2.0",
        "method": "server.closing",
        "params": {"code": 1012, "reason": "the daemon stops: reconnect"},
    },
]


def call(id_: Any, method: str, params: Any = None) -> bytes:
    """A request as a line."""
    members = {} if params is None else {"params": params}
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, **members}).encode() + b"\n"


def defects(daemon: StdioDaemon) -> list[str]:
    """Lines of its log that there must not be."""
    return [line for line in daemon.log.splitlines() if "Traceback" in line or '"error"' in line]


# Who the parent is, and what it gets.


async def test_the_parent_is_host_for_good_and_finds_a_whole_daemon(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state", *METHODS) as daemon:
        parent = line_peer(daemon.stdout, daemon.stdin)
        assert await parent.call("test.host_only") is None
        answer = await parent.call("session.auth", {"host_token": daemon.token("host-token")})
        assert (answer["ok"], answer["auth_enabled"], answer["role"]) == (True, True, "host")
        with pytest.raises(Refused) as refused:
            await parent.call("session.auth", {"token": daemon.token()})
        assert refused.value.type == "forbidden"
        async with peer(await daemon.ready()) as other:
            run_id = (await other.create())["id"]
            assert (await parent.call("runs.get", {"run_id": run_id}))["id"] == run_id, "the host sees all"
            assert (await other.call("server.status"))["counts"]["connections"] == 2
        assert daemon.metrics()["internal_errors"] == 0


async def test_a_trace_is_live_over_standard_output(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state") as daemon:
        parent = line_peer(daemon.stdout, daemon.stdin)
        async with peer(await daemon.ready()) as owner:
            run_id = (await owner.create())["id"]
            await parent.call("runs.trace.subscribe", {"run_id": run_id})
            await owner.record(run_id, *(text(n) for n in range(500)))
            await owner.record(run_id, {"type": "agent_end", "text": "done"})
            cursors = [cursor_of(await parent.next_frame()) for _ in range(503)]
        assert cursors == [*range(502), 501], "started, the events, ended"


async def test_ten_megabytes_go_each_way(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state", *METHODS) as daemon:
        parent = line_peer(daemon.stdout, daemon.stdin)
        assert len(await parent.call("test.bytes", {"size": 10 * MIB})) == 10 * MIB - 2
        assert (await parent.call("server.ping", {"pad": "x" * (10 * MIB)}))["now_ms"]


async def test_standard_output_has_nothing_but_frames_whatever_a_method_prints_or_reads(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state", *METHODS) as daemon:
        daemon.stdin.write(call(1, "test.print"))
        first = json.loads(await asyncio.wait_for(daemon.stdout.readline(), 20))
        assert (first["id"], first["result"]) == (1, ""), "standard input is empty to it, and has no more to come"
        daemon.stdin.write(call(2, "server.ping"))
        daemon.stdin.write_eof()
        second, *end = await daemon.rest()
        assert second["result"]["now_ms"]
        assert end == END
        assert await daemon.exit_code() == 0
    assert daemon.log.count(NOISE) == 4, "it is on standard error"
    assert daemon.log.count("listening on ws://127.0.0.1:") == 1


# The end of input.


async def test_at_the_end_of_input_all_that_was_asked_is_answered_then_the_daemon_ends_with_0(tmp_path: Path) -> None:
    calls = 1_000
    state = tmp_path / "state"
    async with stdio_daemon(state) as daemon:
        create = call("create", "runs.create", {"prompt": "p", "idempotency_key": "k"})
        daemon.stdin.write(create + b"".join(call(n, "server.ping") for n in range(calls)) + create)
        daemon.stdin.write_eof()
        lines = await daemon.rest()
        assert await daemon.exit_code() == 0
    assert lines[-2:] == END
    assert [line["id"] for line in lines[:-2] if line["id"] != "create"] == list(range(calls))
    runs = [line["result"]["id"] for line in lines[:-2] if line["id"] == "create"]
    assert len(runs) == 2
    assert runs[0] == runs[1]
    assert not defects(daemon)
    assert not (state / "endpoint.json").exists()


async def test_what_waits_at_the_end_of_input_is_waited_for(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state", *METHODS) as daemon:
        daemon.stdin.write(call(1, "test.wait", {"name": "gate"}))
        daemon.stdin.write_eof()
        async with peer(await daemon.ready(), "host-token") as other:
            await daemon.until("requests_in_flight", 1)
            assert (await other.call("server.status"))["draining"] is False
            await other.call("test.release", {"name": "gate"})
            assert await other.closed() == (1012, "the daemon stops: reconnect")
        answer, *end = await daemon.rest()
        assert (answer["id"], answer["result"]) == (1, "gate")
        assert end == END
        assert await daemon.exit_code() == 0


@pytest.mark.parametrize("sizes", [[400 * KIB, 300 * KIB, 100], [100 * KIB, 60 * KIB, 100]], ids=["much", "less"])
async def test_a_parent_that_reads_late_gets_every_frame_before_the_daemon_exits(
    sizes: list[int], tmp_path: Path
) -> None:
    """Much: some of it is still with the connection. Less: all of it is with the kernel and the thread that writes."""
    close_s = 0.05
    # All of it is with the socket at once, so that it is the end that waits for the parent, and not a write.
    async with stdio_daemon(tmp_path / "state", *METHODS, close_s=close_s, high_water_bytes=MIB) as daemon:
        daemon.stop_reading()
        daemon.stdin.write(b"".join(call(n, "test.bytes", {"size": size}) for n, size in enumerate(sizes)))
        daemon.stdin.write_eof()
        await daemon.said("closing: the daemon stops")
        await asyncio.sleep(5 * close_s)  # what must not happen meanwhile cannot be waited for
        assert daemon.process is not None
        assert daemon.process.poll() is None
        daemon.go_on_reading()
        lines = await daemon.rest()
        assert await daemon.exit_code() == 0
    assert [len(line["result"]) for line in lines[: len(sizes)]] == [size - 2 for size in sizes]
    assert lines[len(sizes) :] == END


async def test_files_do_for_standard_input_and_output(tmp_path: Path) -> None:
    given, taken = tmp_path / "in", tmp_path / "out"

    def run() -> int:
        given.write_bytes(b"".join(call(n, "server.ping") for n in range(100)))
        with given.open("rb") as stdin, taken.open("wb") as stdout:
            command = stdio_command(tmp_path / "state")
            return subprocess.run(
                command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, env=environment(), check=False
            ).returncode

    assert await asyncio.to_thread(run) == 0
    lines = [json.loads(line) for line in (await asyncio.to_thread(taken.read_bytes)).splitlines()]
    assert [line["id"] for line in lines[:100]] == list(range(100))
    assert lines[100:] == END


async def test_a_standard_output_that_takes_nothing_is_told_of_and_ends_the_daemon(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[bytes]:
        with open("/dev/full", "wb") as stdout:
            return subprocess.run(
                stdio_command(tmp_path / "state"),
                input=call(1, "server.ping"),
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=environment(),
                check=False,
            )

    done = await asyncio.to_thread(run)
    assert done.returncode == 0
    assert b"standard output takes no more: No space left on device" in done.stderr


async def test_pipes_that_the_parent_made_non_blocking_do(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.setblocking(False)
            child = await asyncio.to_thread(_start_on, theirs, tmp_path / "state")
        ours.sendall(call(1, "test.bytes", {"size": 4 * MIB}))
        ours.shutdown(socket.SHUT_WR)
        got = await asyncio.to_thread(_all, ours)
        assert await asyncio.to_thread(child.wait, 20) == 0
    answer, *end = map(json.loads, got.splitlines())
    assert len(answer["result"]) == 4 * MIB - 2
    assert end == END


def _start_on(sock: socket.socket, state: Path) -> subprocess.Popen[bytes]:
    """A child that has one socket for both."""
    command, quiet = stdio_command(state, *METHODS), subprocess.DEVNULL
    return subprocess.Popen(command, stdin=sock.fileno(), stdout=sock.fileno(), stderr=quiet, env=environment())


def _all(sock: socket.socket) -> bytes:
    got = bytearray()
    while data := sock.recv(MIB):
        got += data
    return bytes(got)


# Other ends.


async def test_a_signal_tells_the_parent_and_does_not_wait_for_its_end(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state", close_s=60) as daemon:
        daemon.stdin.write(call(1, "server.ping"))
        assert json.loads(await daemon.stdout.readline())["id"] == 1
        assert daemon.process is not None
        daemon.process.terminate()
        assert await daemon.rest() == END
        assert await daemon.exit_code() == 0


async def test_when_nobody_reads_standard_output_any_more_the_daemon_ends(tmp_path: Path) -> None:
    async with stdio_daemon(tmp_path / "state") as daemon, peer(await daemon.ready()) as other:
        daemon.hang_up()
        await asyncio.sleep(0)  # the loop closes it in its next turn; an answer before that would still be taken
        with contextlib.suppress(ConnectionError):
            daemon.stdin.write(call(1, "server.ping"))
            await daemon.stdin.drain()
        assert (await other.closed())[0] == 1012
        assert await daemon.exit_code() == 0
        assert "the parent has ended: draining" in daemon.log
        assert not defects(daemon)


async def test_a_parent_that_does_not_read_is_given_up_and_the_daemon_with_it(tmp_path: Path) -> None:
    # All of the drain's time is waited for the parent; an eighth of it is then enough for storage, where no disk is.
    timing = {"write_s": 0.4, "drain_s": 3, "durability": "memory"}
    async with stdio_daemon(tmp_path / "state", *METHODS, **timing) as daemon:
        daemon.stop_reading()
        daemon.stdin.write(call(1, "test.bytes", {"size": 15 * MIB}))
        assert await daemon.exit_code() == 0
        assert "aborted: the peer has not read for write_s" in daemon.log
        assert not defects(daemon)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"], ids=["input", "output", "error"])
async def test_a_closed_standard_stream_is_one_line_and_exit_1(closed: str, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        script = f'exec "$@" {closed}'
        command = ["sh", "-c", script, "sh", *stdio_command(tmp_path / "state")]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment(), timeout=20)

    done = await asyncio.to_thread(run)
    assert (done.returncode, done.stdout) == (1, "")
    if closed != "2>&-":
        assert re.fullmatch(r"carserver: .*standard .* is closed.*\n", done.stderr)


async def test_the_unix_socket_is_served_beside_it(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        await _unix_beside(path, tmp_path / "state")


async def _unix_beside(path: Path, state: Path) -> None:
    async with stdio_daemon(state, unix=path) as daemon:
        await daemon.ready()
        async with unix_peer(path) as client:
            assert (await client.call("server.ping"))["now_ms"]
            daemon.stdin.write_eof()
            assert await client.closed() == (1012, "the daemon stops: reconnect")
        assert await daemon.rest() == END
        assert await daemon.exit_code() == 0
